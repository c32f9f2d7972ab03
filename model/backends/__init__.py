"""Device backends: the interface, its implementations, and the registry."""
