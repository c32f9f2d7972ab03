"""The host: cores, memory, control groups, files written whole. Imports nothing else of the launcher."""
