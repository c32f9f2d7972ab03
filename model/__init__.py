"""The model: forward pass, generation, tokenizers, checkpoint formats. Starts no process and does not read the environment."""
