"""Selection of the device for the ranks of this host, validated before any rank starts.

`auto` selects the CPU until the self-check of the device's backend passes: having an accelerator must not change a machine's results.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from launcher.environment.detection import LaunchEnvironment
from launcher.host.accelerators import may_have_accelerator
from launcher.job.device_facts import DeviceFacts
from launcher.job.tasks import TANDEM_RUN
from parallel.errors import ConfigError
from parallel.lazy_torch import torch

_SHARES_DEVICES = ("none", "torchrun", TANDEM_RUN)
"""Launchers whose ranks all see the same devices; the others can assign one device to each rank."""


@dataclass(frozen=True, slots=True)
class ChosenDevice:
    """The device of the ranks of this host."""

    kind: str
    """Device type."""
    rank_bytes: int | None = None
    """Free memory of the device for each rank that may share it; None for the CPU."""
    sharing: int = 1
    """Number of ranks on each device, as far as known."""


def choose_device(
    word: str, environment: LaunchEnvironment, num_local: int, ranks_per_device: int, read: Callable[[bool], DeviceFacts]
) -> ChosenDevice:
    """Return the device that `--device` selects for `num_local` ranks of this host, up to `ranks_per_device` on each.

    `read` looks at the devices, with their self-check if its argument is true; it is not called on a machine that has none. Says in a line
    why `auto` uses the CPU although there is a device. Raises ConfigError if the device is unavailable or too few are visible.
    """
    if word == "cpu" or (word == "auto" and not may_have_accelerator()):
        return ChosenDevice("cpu")
    if word == "auto":
        try:
            facts = read(True)
        except ConfigError as error:
            facts = DeviceFacts(kind="an accelerator", complaint=str(error))
        if facts.kind is None:
            return ChosenDevice("cpu")
        complaint = facts.complaint or _explain_count(facts, environment, num_local, ranks_per_device)
        if complaint is None:
            return _place(facts, num_local, ranks_per_device)
        if not environment.rank:
            print(f"note: --device auto uses the CPU, not {facts.kind}: {complaint}", file=sys.stderr)
        return ChosenDevice("cpu")
    try:
        facts = read(False)
    except ConfigError as error:
        raise ConfigError(f"{error}: use --device cpu") from None
    if facts.kind != word:
        found = facts.kind or "cpu"
        raise ConfigError(f"--device is {word}, but this PyTorch supports {found} only: install a {word} build, or drop --device")
    if complaint := _explain_count(facts, environment, num_local, ranks_per_device):
        remedy = f"start at most {facts.count * ranks_per_device} ranks here, or let several share a device with --ranks-per-device"
        raise ConfigError(f"{complaint}: {remedy}")
    return _place(facts, num_local, ranks_per_device)


def _place(facts: DeviceFacts, num_local: int, ranks_per_device: int) -> ChosenDevice:
    """Return what each rank has if the ranks are spread evenly: of the device with the least memory, its share."""
    assert facts.kind is not None
    sharing = min(-(-num_local // facts.count), ranks_per_device)
    return ChosenDevice(facts.kind, min(facts.free_bytes) // sharing, sharing)


def _explain_count(facts: DeviceFacts, environment: LaunchEnvironment, num_local: int, ranks_per_device: int) -> str | None:
    """Return what is wrong with the number of ranks; None if each finds its place on a device."""
    if environment.is_rank and environment.local_world_size is None:
        num_local = (environment.local_rank or 0) + 1  # each rank of a launcher checks up to itself
    needed = -(-num_local // ranks_per_device)
    has_own = facts.count == 1 and environment.launcher not in _SHARES_DEVICES  # the ranks compare their devices when they meet
    if needed <= facts.count or has_own:
        return None
    each = "" if ranks_per_device == 1 else f", with {ranks_per_device} on each"
    return f"{num_local} rank(s) on this host need {needed} {facts.kind} devices{each}, but {facts.count} are visible"


def check_collectives(name: str, device: str, sharing: int = 1) -> None:
    """Raise ConfigError if `--collectives nccl` cannot work for ranks on `device`, `sharing` of them on each."""
    if name != "nccl":
        return
    if device != "cuda":
        raise ConfigError(f"--collectives nccl needs --device cuda, but the device is {device}: use --collectives auto")
    if not torch.distributed.is_nccl_available():
        raise ConfigError("--collectives nccl needs a PyTorch build with NCCL, and this one has none: use --collectives gloo")
    if sharing > 1:
        raise ConfigError(f"--collectives nccl needs a device for each rank, but {sharing} ranks share one: use --collectives auto")
