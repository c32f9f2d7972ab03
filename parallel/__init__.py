"""Rank layout, collectives and file reads: the layer below `model`. Works on integers and tensors; does not depend on weight names."""
