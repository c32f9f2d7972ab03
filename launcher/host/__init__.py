"""Services of the host: cores, memory, control groups, atomic writes. Imports no other launcher package."""
