"""Command-line options, MindFormers YAML, and quantization settings."""
