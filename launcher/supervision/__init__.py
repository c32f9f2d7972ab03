"""Starts, watches and stops ranks, and writes the verdict on failures."""
