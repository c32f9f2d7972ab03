"""Model sizes, weight names and splits, quantization schemes: no tensors are touched."""
