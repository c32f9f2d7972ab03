"""Options, MindFormers YAML and quantization settings."""
