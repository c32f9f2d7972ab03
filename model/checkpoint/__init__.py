"""Checkpoint formats: one file each, told apart in `formats.py`. Only here are names other than Hugging Face's known."""
