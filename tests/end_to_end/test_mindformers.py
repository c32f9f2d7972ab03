"""MindFormers' checkpoints through the command line: fused weights in both row orders, layouts of folders, early refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.mindspore_files import fuse, interleave, write_ckpt

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

NAMES = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo"}
NAMES = {f"self_attn.{name}_proj": ours for name, ours in NAMES.items()}
NAMES |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
NAMES |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
PROMPT = ("--prompt", "I love Beijing, because the streets", "--max-new-tokens", "12", "--greedy")


def write_fused(folder: Path, source: Path, config: Path, order: str) -> Path:
    """The checkpoint of a Hugging Face folder as one .ckpt of fused weights, its YAML and tokenizer next to it."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        name = name.replace("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight").replace("model.norm.", "model.norm_out.")
        tensors[name] = tensor
    fused = fuse(tensors)
    write_ckpt(folder / "llama.ckpt", interleave(fused, 9, 3) if order == "1.4" else fused, crc=True)
    (folder / "tiny.yaml").write_text(config.read_text().replace("do_sample: False", "do_sample: False\n    eos_token_id: [2]"))
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


def read_ids(outcome: "Outcome") -> list[list[int]]:
    return [record["token_ids"] for record in outcome.records]


@pytest.mark.parametrize(("order", "workers"), [("1.3", 2), ("1.4", 1), ("1.4", 2)])
def test_fused_weights_decode_to_the_same_tokens(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, order: str, workers: int
) -> None:
    expected = tandem.predict("--checkpoint", checkpoints.float, "--workers", "1", *PROMPT)
    folder = write_fused(tmp_path / "model", checkpoints.float, checkpoints.config, order)
    # A folder of one YAML and one checkpoint needs no -c.
    found = tandem.predict("--checkpoint", folder, "--workers", str(workers), "--fused-order", order, *PROMPT)
    assert read_ids(found) == read_ids(expected)
    assert sum(found.stats["read_bytes"]) <= 1.1 * sum(expected.stats["read_bytes"])


@pytest.mark.parametrize("command", ["predict", "plan", "eval", "bench", "quantize", "reshard", "convert"])
def test_random_weights_do_not_tell_their_order(checkpoints: "Checkpoints", refuse: Callable[..., None], command: str) -> None:
    def make(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
        model = write_fused(folder / "model", checkpoints.float, checkpoints.config, "1.4")
        rest = {"reshard": ["out", "--workers", "2"], "convert": ["out"], "quantize": ["-a", "rtn-a16w8"]}
        rest["eval"] = ["--task", "perplexity", "--data", model / "tiny.yaml"]
        return [command, *([] if command in ("reshard", "convert") else ["--checkpoint"]), model, *rest.get(command, [])]

    refuse(make, [r"row order cannot be told: order 1\.3 explains .* order 1\.4 explains", r"give --fused-order 1\.3 for files of"], False)


def test_a_word_that_is_no_order_is_refused(checkpoints: "Checkpoints", refuse: Callable[..., None]) -> None:
    def make(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
        model = write_fused(folder / "model", checkpoints.float, checkpoints.config, "1.4")
        return ["predict", "--checkpoint", model, "--fused-order", "2.0"]

    refuse(make, [r"--fused-order is '2\.0', but has to be one of auto, 1\.3, 1\.4"], False)


def test_a_checkpoint_without_tokenizer_names_what_is_missing(checkpoints: "Checkpoints", refuse: Callable[..., None]) -> None:
    def make(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
        model = write_fused(folder / "model", checkpoints.float, checkpoints.config, "1.4")
        for file in model.glob("tokenizer*"):
            file.unlink()
        return ["predict", "--checkpoint", model / "llama.ckpt", "--fused-order", "1.4"]

    refuse(make, [r"no tokenizer: neither tokenizer\.model nor tokenizer\.json is next to .*llama\.ckpt; put one there"], False)


@pytest.mark.parametrize(("order", "workers"), [("1.3", 3), ("1.4", 3)])
def test_trained_weights_tell_their_order(tandem: "Tandem", stories: Path, shared_dir: Path, order: str, workers: int) -> None:
    cases = shared_dir / "cases" / "mindformers"
    if not cases.is_dir():
        pytest.skip("no cases/mindformers among the shared data")
    truth = next(item for item in json.loads((stories / "golden_greedy_fp32.json").read_text())["items"] if len(item["prompt"]) > 5)
    found = tandem.predict(
        *("-c", cases / "fused.yaml", "--checkpoint", cases / f"fused-{order}-order", "--workers", str(workers), "--dtype", "float32"),
        *("--prompt", truth["prompt"], "--max-new-tokens", "24", "--greedy"),
    )
    assert read_ids(found) == [truth["new_ids"][:24]]
    assert re.search(rf"the fused weights are in the row order of MindFormers {order}, detected: order 1\.3 explains", found.stderr)


@pytest.mark.parametrize("name", ["L05-two-steps-each-rank", "L08-pipeline-2", "L20-golden-stick-1.4-safetensors"])
def test_layouts_decode_as_the_weights_that_they_hold(
    tandem: "Tandem",
    stories: Path,
    shared_dir: Path,
    tmp_path: Path,
    choose_with_transformers: Callable[..., list[list[int]]],
    name: str,
) -> None:
    cases = shared_dir / "cases" / "mindformers"
    if not cases.is_dir():
        pytest.skip("no cases/mindformers among the shared data")
    config = () if (cases / name / "config.json").is_file() else ("-c", cases / "fused.yaml")
    arguments = (*config, "--checkpoint", cases / name, "--workers", "2", "--dtype", "float32")
    found = tandem.predict(*arguments, "--prompt", "Once upon a time, a dog", "--max-new-tokens", "24", "--greedy")
    plain = tmp_path / "plain"
    plain.mkdir()
    stored = load_file(next((cases / name).glob("*.safetensors"))) if not config else load_file(stories / "model.safetensors")
    tensors = {}
    for key, tensor in stored.items():
        if key.endswith((".weight_scale", ".weight_offset")):
            continue
        tensors[key] = tensor * stored[f"{key}_scale"] if tensor.dtype == torch.int8 else tensor
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_bytes((stories / "config.json").read_bytes())
    assert choose_with_transformers(plain, [found.records[0]["prompt_token_ids"]], read_ids(found)) == read_ids(found)
