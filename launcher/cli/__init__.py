"""The command line: command names and help."""
