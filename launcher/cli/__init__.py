"""The command line: option declarations only."""
