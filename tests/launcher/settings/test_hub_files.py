"""Which files of a repository are downloaded, and which GGUF file a variant selects."""

import json
from pathlib import Path

import pytest

from launcher.settings.hub_files import choose_files, choose_gguf, find_missing, is_whole
from launcher.settings.hub_models import HubName, fetch_model, parse_hub_name
from parallel.errors import CheckpointError

PARTS = [f"Q8_0/m-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
GGUFS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_XL.gguf", "mmproj-F16.gguf", *PARTS, "README.md", "config.json"]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        ("Q8_0", PARTS),
        (PARTS[0], PARTS),
        ("m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
    ],
)
def test_a_variant_selects_one_file_with_all_its_parts(variant: str, expected: list[str]) -> None:
    assert choose_gguf("org/m", GGUFS, variant) == expected
    assert choose_files("org/m", GGUFS, variant) == sorted([*expected, "config.json"])


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("Q4_K", r"org/m holds 0 GGUF files named Q4_K: m-Q4_K_M, m-Q4_K_S, .*; name one, as in org/m:Q4_K_M$"),
        ("m", r"org/m holds 4 GGUF files named m: m-Q4_K_M, "),
        ("Q9", r"holds 0 GGUF files named Q9"),
        (None, r"org/m holds 4 GGUF files: m-Q4_K_M, .*; name one, as in org/m:Q4_K_M"),
    ],
)
def test_a_variant_that_is_not_one_file_is_refused_with_all_there_are(variant: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        choose_gguf("org/m", GGUFS, variant)


def test_safetensors_are_preferred_to_gguf_and_both_to_pickles() -> None:
    both = ["config.json", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert choose_files("org/m", [*both, "m.gguf"]) == ["config.json", "model.safetensors"]
    assert choose_files("org/m", [*both, "m.gguf"], "m") == ["config.json", "m.gguf"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    files = ["config.json", *bins, "training_args.bin", "pytorch_model.bin.index.json", "tokenizer.json"]
    assert choose_files("org/m", files) == sorted({*files} - {"training_args.bin"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/m:Q4_K_M", HubName("org/m", None, "Q4_K_M")),
        ("org/m@v1:Q8_0", HubName("org/m", "v1", "Q8_0")),
        ("https://huggingface.co/org/m/blob/main/Q8_0/m.gguf", HubName("org/m", "main", "Q8_0/m.gguf")),
        ("https://huggingface.co/org/m/resolve/v1/m.gguf?download=true", HubName("org/m", "v1", "m.gguf")),
        ("https://huggingface.co/org/m/tree/main", HubName("org/m", "main")),
        ("https://huggingface.co/org/m", HubName("org/m")),
    ],
)
def test_names_and_pages_of_files_are_parsed(text: str, expected: HubName) -> None:
    assert parse_hub_name(text) == expected


def test_a_name_reads_back() -> None:
    for name in (HubName("org/m"), HubName("org/m", "v1"), HubName("org/m", None, "Q8_0"), HubName("org/m", "v1", "Q8_0")):
        assert parse_hub_name(str(name)) == name


def test_missing_parts_of_a_download_are_found(tmp_path: Path) -> None:
    assert is_whole(PARTS) and not is_whole(PARTS[:2]) and is_whole(["m.gguf"]) and not is_whole([])
    for name in ("config.json", "tokenizer.json", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).write_text("{}")
    assert find_missing(tmp_path) == "pytorch_model-00002-of-00002.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-00003-of-00003.bin"}}))
    assert find_missing(tmp_path) == "pytorch_model-00002-of-00002.bin"
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_text("{}")
    assert find_missing(tmp_path) == "pytorch_model-00003-of-00003.bin"


def write_snapshot(home: Path, *files: str) -> Path:
    repository = home / "models--org--m"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("abc")
    for file in files:
        path = repository / "snapshots" / "abc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return repository / "snapshots" / "abc"


def test_cached_gguf_files_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = write_snapshot(tmp_path, "m-Q4_K_M.gguf")
    assert fetch_model(HubName("org/m"), offline=True) == snapshot / "m-Q4_K_M.gguf"
    write_snapshot(tmp_path, *PARTS[:2])
    with pytest.raises(CheckpointError, match=r"org/m:Q8_0 is incomplete in the local cache"):
        fetch_model(HubName("org/m", None, "Q8_0"), offline=True)
    write_snapshot(tmp_path, PARTS[2])
    assert fetch_model(HubName("org/m", None, "q8_0"), offline=True) == snapshot / PARTS[0]
    assert fetch_model(HubName("org/m", None, "Q4_K_M"), offline=True) == snapshot / "m-Q4_K_M.gguf"
    with pytest.raises(CheckpointError, match=r"org/m holds 2 GGUF files: m-Q4_K_M, m-Q8_0; name one, as in org/m:Q4_K_M"):
        fetch_model(HubName("org/m"), offline=True)
