"""Model sizes, weight names and splits, quantization schemes. Does not touch tensors."""
