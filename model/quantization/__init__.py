"""Quantization algorithms: from float weights to integers and scales."""
