"""Models on the Hugging Face Hub: their names, and their folders in the local cache, downloaded if needed.

Downloads only the files that a run reads, preferring safetensors. huggingface_hub itself reads HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE.
"""

import glob
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.settings.hub_files import choose_files, choose_gguf, find_missing, is_whole
from parallel.errors import CheckpointError

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<variant>[\w./-]+))?")
_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|commit)/(?P<revision>[^/?#]+)(?:/(?P<variant>[^?#]*\.gguf))?[^?#]*)?/?(?:[?#].*)?"
)
_FILE_ENDS = (".safetensors", ".gguf", ".ckpt", ".bin", ".pth", ".pt", ".yaml", ".yml", ".json", ".jsonl", ".txt")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the Hub."""

    id: str
    """org/name."""
    revision: str | None = None
    """Branch, tag or commit; None means main."""
    variant: str | None = None
    """Which of several GGUF files: a part of its name, such as Q4_K_M, or its path."""

    def __str__(self) -> str:
        revision, variant = self.revision and f"@{self.revision}", self.variant and f":{self.variant}"
        return f"{self.id}{revision or ''}{variant or ''}"


def parse_hub_name(text: str) -> HubName | None:
    """Parse `org/name`, `org/name@revision`, either with `:variant`, or the URL of its page or file; None for anything else."""
    match = _URL.fullmatch(text) or (None if text.lower().endswith(_FILE_ENDS) else _ID.fullmatch(text))
    return HubName(match["id"], match["revision"], match["variant"]) if match else None


def fetch_model(name: HubName, *, offline: bool) -> Path:
    """Return the folder of a model, or its GGUF file, from the local cache if complete there, otherwise downloaded.

    Raises CheckpointError if the Hub has no such model, if its files cannot be read by tandem, or if the Hub is unreachable.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    cached = _find_snapshot(name)
    offline = offline or constants.HF_HUB_OFFLINE
    if cached is not None and (found := _find_cached(name, cached, needs_tokenizer=not offline)) is not None:
        return found
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
        snapshot = Path(snapshot_download(name.id, revision=name.revision, allow_patterns=[glob.escape(file) for file in files]))
    except Exception as error:  # errors of the HTTP library, which differ between versions of huggingface_hub
        raise CheckpointError(f"{name} cannot be downloaded from {constants.ENDPOINT}: {_first_line(error)}; repeat to resume") from None
    gguf = choose_gguf(name.id, files)
    return snapshot / gguf[0] if gguf else snapshot


def _find_cached(name: HubName, snapshot: Path, *, needs_tokenizer: bool) -> Path | None:
    """Return the cached folder or GGUF file of a model; None if it is incomplete. Raises CheckpointError for several GGUF files."""
    held = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf") if file.exists()]
    if name.variant is None and (not held or any(snapshot.glob("*.safetensors"))):
        return snapshot if find_missing(snapshot, needs_tokenizer=needs_tokenizer) is None else None
    try:
        parts = choose_gguf(name.id, held, name.variant)
    except CheckpointError:
        if name.variant is None:
            raise
        return None  # the repository may hold it
    return snapshot / parts[0] if is_whole(parts) else None


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
    files = choose_files(name.id, list(sizes), name.variant)
    return files, sum(sizes[file] for file in files)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
