"""Models on the Hugging Face Hub: their names, and their folders in the local cache, downloaded if needed.

Downloads only the files that a run reads, preferring safetensors. huggingface_hub itself reads HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE.
"""

import glob
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|commit)/(?P<revision>[^/?#]+)[^?#]*)?/?(?:[?#].*)?"
)
_FILE_ENDS = (".safetensors", ".gguf", ".ckpt", ".bin", ".pth", ".pt", ".yaml", ".yml", ".json", ".jsonl", ".txt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the Hub."""

    id: str
    """org/name."""
    revision: str | None = None
    """Branch, tag or commit; None means main."""

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """Parse `org/name`, `org/name@revision` or the URL of its page; None for anything else."""
    match = _URL.fullmatch(text) or (None if text.lower().endswith(_FILE_ENDS) else _ID.fullmatch(text))
    return HubName(match["id"], match["revision"]) if match else None


def fetch_model(name: HubName, *, offline: bool) -> Path:
    """Return the folder of a model, from the local cache if complete there, otherwise downloaded.

    Raises CheckpointError if the Hub has no such model, if its files cannot be read by tandem, or if the Hub is unreachable.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    cached = _find_snapshot(name)
    offline = offline or constants.HF_HUB_OFFLINE
    if cached is not None and find_missing(cached, needs_tokenizer=not offline) is None:
        return cached
    if offline:
        missing = "is incomplete in" if cached is not None else "is not a file or folder here, and not in"
        raise CheckpointError(
            f"{name} {missing} the local cache {constants.HF_HUB_CACHE}, and downloads are off: leave out --offline and HF_HUB_OFFLINE"
        )
    files, num_bytes = _list_files(name)
    if not sys.stderr.isatty():
        disable_progress_bars()
    print(f"downloading {name}: {len(files)} files, {num_bytes / 1e6:.0f} MB, to {constants.HF_HUB_CACHE}", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(name.id, revision=name.revision, allow_patterns=[glob.escape(file) for file in files]))
    except Exception as error:  # errors of the HTTP library, which differ between versions of huggingface_hub
        raise CheckpointError(f"{name} cannot be downloaded from {constants.ENDPOINT}: {_first_line(error)}; repeat to resume") from None


def _find_snapshot(name: HubName) -> Path | None:
    """Return the folder of a revision in the cache, complete or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.id, repo_type="model")
    revision = name.revision or "main"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def choose_files(name: str, files: Sequence[str]) -> list[str]:
    """Select the files to download from a repository. Raises CheckpointError if none of its weights can be read."""
    top = [file for file in files if "/" not in file]
    safetensors = [file for file in top if file.endswith(".safetensors") and not file.startswith(("consolidated", "adapter_"))]
    ggufs, meta = [file for file in top if file.endswith(".gguf")], [file for file in top if re.fullmatch(r"consolidated.*\.pth", file)]
    ckpts = [file for file in top if file.endswith(".ckpt")]
    if "model.safetensors" in safetensors:
        weights = ["model.safetensors"]
    elif safetensors:
        weights = safetensors
    elif len(ggufs) > 1:
        page = f"https://huggingface.co/{name}"
        raise CheckpointError(f"{name} holds {len(ggufs)} GGUF files ({ggufs[0]}, ...): download one from {page} and give its path")
    else:
        weights = ggufs or (meta if "params.json" in top else []) or ckpts
    if not weights:
        if any(file.endswith((".bin", ".pt", ".pth")) for file in top):
            raise CheckpointError(f"{name} holds PyTorch .bin weights only, which are not read: give a repository with safetensors")
        raise CheckpointError(f"{name} holds no weights that can be read (safetensors, GGUF, consolidated.*.pth or .ckpt)")
    beside = [
        file
        for file in top
        if file.endswith((".json", ".jinja", ".model", ".yaml", ".yml", ".chk"))
        or file in ("merges.txt", "vocab.txt", "SHA256SUMS", "sha256sums")
    ]
    return sorted({*weights, *(file for file in beside if "pytorch_model" not in file and not file.startswith("adapter_"))})


def find_missing(folder: Path, *, needs_tokenizer: bool = True) -> str | None:
    """Return the first file missing from a downloaded folder, as far as can be determined; None if it is complete."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    if any(name.endswith((".gguf", ".ckpt")) for name in names) or {"params.json", "tokenizer.model"} <= names:
        return None
    if "config.json" not in names:
        return "config.json"
    if needs_tokenizer and not names & {"tokenizer.json", "tokenizer.model"}:
        return "the tokenizer"
    if "model.safetensors" in names:
        return None
    needed: set[str] = set()
    if "model.safetensors.index.json" in names:
        try:
            needed = set(json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "model.safetensors.index.json"
    for match in filter(None, map(_SHARD.fullmatch, names)):
        needed |= {f"{match[1]}-{number:05}-of-{match[3]}.safetensors" for number in range(1, int(match[3]) + 1)}
    if not needed and not any(name.endswith(".safetensors") for name in names):
        return "the weights"
    return next(iter(sorted(needed - names)), None)


def _list_files(name: HubName) -> tuple[list[str], int]:
    """Return the names of the files to download, and their total size in bytes."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info: Any = HfApi().model_info(name.id, revision=name.revision, timeout=_TIMEOUT_SECONDS, files_metadata=True)
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{name.id}"
        raise CheckpointError(f"{name.id} is gated: accept its terms at {page}, then log in with hf auth login or set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name.id} has no revision {name.revision}: see {constants.ENDPOINT}/{name.id}/refs") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name.id} is not a file or folder here, and not a model on {constants.ENDPOINT}: check the name; a private one needs HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{constants.ENDPOINT} refused {name}: {_first_line(error)}") from None
    except Exception as error:  # errors of the HTTP library, which differ between versions of huggingface_hub
        raise CheckpointError(
            f"{name} is not a file or folder here, and {constants.ENDPOINT} cannot be reached: {_first_line(error)}; give a local path"
        ) from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = choose_files(name.id, list(sizes))
    return files, sum(sizes[file] for file in files)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
