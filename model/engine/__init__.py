"""Generation: scheduling, sampling, speculation, KV cache blocks."""
