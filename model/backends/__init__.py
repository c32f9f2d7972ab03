"""How tensors are multiplied on one kind of device: the interface, its implementations, and the table that finds one."""
