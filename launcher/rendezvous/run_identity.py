"""What all nodes and ranks of a run must have in common, and the error if they differ.

Ranks with different weights, programs or kernels would compute parts of different models without noticing.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.job.job import Job
from launcher.rendezvous.errors import DifferentRunError
from model.kernels.library import find_kernels
from parallel.lazy_torch import torch

_PACKAGES = ("tandem", "launcher", "model", "parallel")
_REMEDIES = {
    "checkpoint fingerprint": "copy the same checkpoint to every node",
    "draft model fingerprint": "copy the same draft model to every node",
    "program": "install the same version on every node",
    "kernels": "install tandem the same way on every node, or use nodes with the same CPU features",
}
"""How to fix a difference; all others are differences of options."""


def describe_run(job: Job) -> dict[str, Any]:
    """Return the values that must be equal everywhere, keyed by their names in messages."""
    return {
        "checkpoint fingerprint": job.fingerprint.content,
        "draft model fingerprint": job.draft.fingerprint.content if job.draft is not None else None,
        **describe_program(),
        "kernels": _describe_kernels(job.device),
        **job.shared_settings,
    }


def describe_program() -> dict[str, Any]:
    """Return the part of `describe_run` that does not depend on a job: the versions of tandem and PyTorch."""
    return {"program": f"tandem {read_version()} (sources {_hash_sources()}), torch {version('torch').partition('+')[0]}"}


def compare_runs(who: str, theirs: Mapping[str, Any], me: str, mine: Mapping[str, Any]) -> None:
    """Raise DifferentRunError for the first value that differs between two descriptions. `who` and `me` name them."""
    for name in {**mine, **theirs}:
        if theirs.get(name) != mine.get(name):
            remedy = _REMEDIES.get(name, "start all with the same options")
            raise DifferentRunError(f"{who} has {name} {theirs.get(name)}, but {me} has {mine.get(name)}: {remedy}")


def read_version() -> str:
    """Return the version of this program."""
    with suppress(PackageNotFoundError):
        return version("tandem-launcher")
    return "not installed"


@cache
def _hash_sources() -> str:
    """Return a hash that distinguishes checkouts of the same version."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _describe_kernels(device: str) -> str:
    """Describe the kernels. Native kernels give bitwise identical results on every CPU that runs them, except for products of bfloat16
    pairs; PyTorch's depend on the instruction set."""
    if device == "cpu" and (kernels := find_kernels()) is not None:
        return "native" + (" (bfloat16 pairs)" if kernels.instruction_set.adds_pairs else "")
    return f"PyTorch ({torch.backends.cpu.get_cpu_capability() if device == 'cpu' else device})"
