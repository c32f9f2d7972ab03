"""Writers that combine a checkpoint with a model: convert, quantized folders, MindSpore files."""
