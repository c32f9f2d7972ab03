"""User-visible output: console, results file, plan drawing."""
