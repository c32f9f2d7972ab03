"""The only reader of environment variables, and the table of launchers."""
