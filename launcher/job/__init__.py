"""The description of a run as a value: what the ranks do, and whether it fits in memory."""
