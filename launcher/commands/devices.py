"""Selection of the device for the ranks of this host, validated before any rank starts.

`auto` selects the CPU: the device backend is not optimized yet, and having an accelerator must not change a machine's behavior.
"""

from launcher.environment.detection import LaunchEnvironment
from launcher.job.tasks import TANDEM_RUN
from parallel.errors import ConfigError
from parallel.lazy_torch import torch

_SHARES_DEVICES = ("none", "torchrun", TANDEM_RUN)
"""Launchers whose ranks all see the same devices; the others can assign one device to each rank."""


def choose_device(word: str, environment: LaunchEnvironment, num_local: int) -> str:
    """Return the device type that `--device` selects for `num_local` ranks of this host.

    Raises ConfigError if it is unavailable, or if fewer devices than ranks are visible: each rank needs its own.
    """
    if word in ("auto", "cpu"):
        return "cpu"
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if available is None or available.type != word:
        found = available.type if available is not None else "cpu"
        raise ConfigError(f"--device is {word}, but this PyTorch supports {found} only: install a {word} build, or drop --device")
    if environment.is_rank and environment.local_world_size is None:
        num_local = (environment.local_rank or 0) + 1  # each rank of a launcher checks up to itself
    count = torch.accelerator.device_count()
    has_own = count == 1 and environment.launcher not in _SHARES_DEVICES
    if num_local > count and not has_own:
        remedy = f"start at most {count} ranks here, or use --device cpu" if count else "use --device cpu"
        raise ConfigError(f"{num_local} rank(s) on this host need as many {word} devices, but {count} are visible: {remedy}")
    return word


def check_collectives(name: str, device: str) -> None:
    """Raise ConfigError if `--collectives nccl` cannot work for ranks on `device`."""
    if name != "nccl":
        return
    if device != "cuda":
        raise ConfigError(f"--collectives nccl needs --device cuda, but the device is {device}: use --collectives auto")
    if not torch.distributed.is_nccl_available():
        raise ConfigError("--collectives nccl needs a PyTorch build with NCCL, and this one has none: use --collectives gloo")
