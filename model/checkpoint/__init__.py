"""Checkpoint formats, one per file, registered in `formats.py`. Only this package handles names other than Hugging Face's."""
