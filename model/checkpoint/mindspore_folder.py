"""Locate the files of a MindSpore checkpoint: a file, a folder, or ranks, as folders rank_0, rank_1, … or as files PREFIX_rank_0-1_2, …

The files are `.ckpt` files or MindFormers' safetensors. Depends on file names, first bytes, and the names in safetensors headers; does
not read tensors.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path

from model.checkpoint.safetensors_file import read_header
from model.spec.quoting import quote, quote_name
from parallel.errors import CheckpointError

NAME_MAP = "param_name_map.json"
"""Maps tensors to files in a folder of MindFormers' safetensors."""
_MARKS = re.compile(rb"[\xd8-\xda]\x5e\x3a\x7f|\x0a[\x80-\xff]{0,9}[\x00-\x7f]\x0a", re.DOTALL)
"""The first word of an encrypted file, or a message (field 1 and its length) that starts with a tag (field 1)."""
_STEP = re.compile(r"(?P<prefix>.*?)(?:_rank_(?P<rank>\d+))?(?:_\d+)?-(?P<epoch>\d+)_(?P<step>\d+)")
"""Checkpoint names written by training: PREFIX_rank_R-EPOCH_STEP."""
_OWN_NAMES = re.compile(r"model\.(tok_embeddings|norm_out|layers\.\d+\.(attention|attention_norm|feed_forward|ffn_norm))\.")
_SUFFIXES = (".ckpt", ".safetensors")


def is_mindspore(path: Path) -> bool:
    """Return whether `path` is a MindSpore file or folder: `.ckpt` files, rank folders, or safetensors with MindFormers' names."""
    if path.is_file():
        if path.suffix == ".safetensors":
            return _has_own_names(path)
        with path.open("rb") as file:
            return _MARKS.match(file.read(16)) is not None
    if (path / NAME_MAP).is_file() or _list_files(path, ".ckpt") or _find_rank_folders(path):
        return True
    return holds_own_names(path)


def holds_own_names(path: Path) -> bool:
    """Return whether a folder holds safetensors with MindFormers' tensor names, whatever the file names."""
    found = _list_files(path, ".safetensors")
    return bool(found) and _has_own_names(found[0])


def find_files(path: Path) -> list[list[Path]]:
    """Return the files of each rank, in rank order; with several training steps, those of the newest.

    Raises CheckpointError if there are none, if a rank is missing, and if ranks are at different steps.
    """
    if not path.is_dir():
        return [[path]]
    if (path / NAME_MAP).is_file():
        return [_read_name_map(path)]
    found = _list_weights(path)
    by_rank = _group_by_rank(found)
    if found and len(by_rank) < 2:
        return [_choose_files(path, found)]
    if found:
        _check_all_ranks(path, by_rank, "file")
        ranks = [_choose_files(path, by_rank[rank]) for rank in sorted(by_rank)]
    else:
        folders = _find_rank_folders(path)
        if not folders:
            raise CheckpointError(f"{path} holds neither a .ckpt file nor folders rank_0, rank_1, …")
        _check_all_ranks(path, folders, "folder")
        ranks = [_choose_files(folders[rank], _list_weights(folders[rank])) for rank in sorted(folders)]
    steps = {_read_step(file): file for files in ranks for file in files}
    if len(steps) > 1:
        (first, one), (second, other) = list(steps.items())[:2]
        raise CheckpointError(
            f"the newest files of the ranks are of different steps: {one} is {_name_step(first)}, {other} is {_name_step(second)}; "
            "copy the same step of all ranks"
        )
    return ranks


def check_single(files: list[Path], names: list[set[str]]) -> None:
    """Raise CheckpointError when files of one rank hold the same tensor, and so are not parts of one model."""
    for number, (file, mine) in enumerate(zip(files, names, strict=True)):
        for other, theirs in zip(files[:number], names, strict=False):
            if both := mine & theirs:
                raise CheckpointError(
                    f"{file.parent} holds {len(files)} files, and {other.name} and {file.name} both hold {min(both)}: "
                    "give the file itself, or leave one checkpoint in the folder"
                )


def _check_all_ranks(path: Path, ranks: Collection[int], what: str) -> None:
    missing = [rank for rank in range(max(ranks) + 1) if rank not in ranks]
    if missing:
        of = "a file of " if what == "file" else ""
        raise CheckpointError(
            f"{path} holds {of}rank_{max(ranks)}, but no{'ne of' if of else ''} rank_{missing[0]}: copy the {what}s of all ranks"
        )


def _list_weights(folder: Path) -> list[Path]:
    """Return the weight files of one folder. Raises CheckpointError if they are in two containers, of which only one can be meant."""
    kinds = [files for suffix in _SUFFIXES if (files := _list_files(folder, suffix))]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder} holds both {kinds[0][0].name} and {kinds[1][0].name}: leave only the .ckpt or only the .safetensors files in it"
        )
    return kinds[0] if kinds else []


def _group_by_rank(files: list[Path]) -> dict[int, list[Path]]:
    """Return the files by the rank in their names, PREFIX_rank_R-EPOCH_STEP; nothing unless all of them name one, with one prefix."""
    ranks: dict[int, list[Path]] = {}
    prefixes = set()
    for file in files:
        match = _STEP.fullmatch(file.stem)
        if match is None or match["rank"] is None:
            return {}
        prefixes.add(match["prefix"])
        ranks.setdefault(int(match["rank"]), []).append(file)
    return ranks if len(prefixes) == 1 else {}


def _choose_files(folder: Path, found: list[Path]) -> list[Path]:
    """Return the files of one rank: those of the newest step, or else all."""
    if not found:
        raise CheckpointError(f"{folder} holds no .ckpt and no .safetensors file: copy this rank's file")
    steps = [(match, file) for file in found if (match := _STEP.fullmatch(file.stem))]
    if len(found) == 1 or not steps:
        return found
    prefixes = {(match["prefix"], match["rank"]) for match, _ in steps}
    if len(steps) < len(found) or len(prefixes) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} files of more than one name, {found[0].name} and {found[-1].name} among them: "
            "which one is meant cannot be told; leave one checkpoint in the folder"
        )
    newest = max((int(match["epoch"]), int(match["step"])) for match, _ in steps)
    chosen = [file for match, file in steps if (int(match["epoch"]), int(match["step"])) == newest]
    if len(chosen) > 1:
        raise CheckpointError(f"{folder} holds {len(chosen)} files of step {_name_step(newest)}, {chosen[0].name} first: leave one of them")
    return chosen


def _read_step(file: Path) -> tuple[int, int] | None:
    match = _STEP.fullmatch(file.stem)
    return (int(match["epoch"]), int(match["step"])) if match else None


def _name_step(step: tuple[int, int] | None) -> str:
    return f"epoch {step[0]} step {step[1]}" if step else "of no step"


def _read_name_map(path: Path) -> list[Path]:
    file = path / NAME_MAP
    try:
        named = json.loads(file.read_text(encoding="utf-8"))
        names = {str(name): str(found) for name, found in named.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} does not hold the file of each tensor as a JSON object: copy it again") from None
    outside = next((name for name in names.values() if not re.fullmatch(r"[^/\\\0]+\.safetensors", name)), None)
    if outside is not None:
        raise CheckpointError(f"{file} names {quote(outside)}, which is no safetensors file of its folder")
    files = [path / name for name in sorted(set(names.values()))]
    missing = [one.name for one in files if not one.is_file()]
    if missing:
        first = quote_name(missing[0])
        raise CheckpointError(f"{path} lacks {len(missing)} of the {len(files)} files that {NAME_MAP} names, {first} first: copy them")
    if not files:
        raise CheckpointError(f"{file} names no tensor: copy it again")
    headers = {one.name: read_header(one) for one in files}
    wrong = [name for name, found in names.items() if name not in headers[found]]
    if wrong:
        raise CheckpointError(
            f"{file} lists {len(wrong)} of {len(names)} tensors that are not in the files it names, {quote_name(wrong[0])} in "
            f"{quote_name(names[wrong[0]])} first: copy the checkpoint again"
        )
    return files


def _find_rank_folders(path: Path) -> dict[int, Path]:
    if not path.is_dir():
        return {}
    return {int(match[1]): one for one in path.iterdir() if one.is_dir() and (match := re.fullmatch(r"rank_(\d+)", one.name))}


def _list_files(folder: Path, suffix: str) -> list[Path]:
    """Return the weight files. Strategy files describe the slicing; hyper_param.safetensors belongs to the optimizer."""
    if not folder.is_dir():
        return []
    left_out = ("hyper_param.safetensors",)
    return sorted(
        file for file in folder.glob(f"*{suffix}") if file.is_file() and "strategy" not in file.name and file.name not in left_out
    )


def _has_own_names(file: Path) -> bool:
    try:
        return any(_OWN_NAMES.match(name) for name in read_header(file))
    except CheckpointError:
        return False
