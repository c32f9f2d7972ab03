"""Detect exited processes through their pidfds."""

import select
from collections.abc import Mapping


def find_ended(descriptors: Mapping[int, int], timeout_seconds: float = 0) -> set[int]:
    """Return the keys of the pidfds whose processes have exited, zombies included; wait up to `timeout_seconds` for the first."""
    poll = select.poll()  # select() does not support descriptors above 1023
    for descriptor in descriptors.values():
        poll.register(descriptor, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(timeout_seconds * 1000)}
    return {key for key, descriptor in descriptors.items() if descriptor in ready}
