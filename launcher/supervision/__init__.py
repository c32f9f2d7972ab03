"""Starts, watches and ends ranks, and writes the verdict."""
