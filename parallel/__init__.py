"""Ground floor: who owns what, how ranks speak, which bytes a rank reads. Knows integers and tensors, no weight names."""
