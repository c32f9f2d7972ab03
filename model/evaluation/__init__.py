"""Scores of a checkpoint."""
