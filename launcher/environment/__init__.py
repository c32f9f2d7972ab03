"""Environment variables, read only in this package, and the table of launchers."""
