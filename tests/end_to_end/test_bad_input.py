"""What users get wrong: every mistake ends with exit code 2 and a sentence that helps, before any process is started."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Mistake:
    """A command with something wrong about it."""

    make: Callable[["Checkpoints", Path], Command]
    """The arguments of tandem, from the good checkpoints and an empty folder."""
    names: tuple[str, ...]
    """What the message has to hold, as regular expressions."""
    usage: bool = False
    """Whether the option parser itself answers, which shows the usage first."""


def _copy_checkpoint(good: "Checkpoints", folder: Path, change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> Path:
    target = folder / "checkpoint"
    shutil.copytree(good.float, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def _predict(*arguments: str | Path) -> Callable[["Checkpoints", Path], Command]:
    return lambda good, folder: ["predict", "--config", good.config, "--checkpoint", good.float, *arguments]


def _with_yaml(change: Callable[[str], str], *arguments: str) -> Callable[["Checkpoints", Path], Command]:
    def make(good: "Checkpoints", folder: Path) -> Command:
        path = folder / "changed.yaml"
        before = good.config.read_text()
        path.write_text(change(before))
        assert path.read_text() != before
        return ["predict", "--config", path, "--checkpoint", good.float, *arguments]

    return make


def _with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[["Checkpoints", Path], Command]:
    return lambda good, folder: ["predict", "--config", good.config, "--checkpoint", _copy_checkpoint(good, folder, change)]


def _truncated(good: "Checkpoints", folder: Path) -> Command:
    checkpoint = _copy_checkpoint(good, folder)
    file = checkpoint / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1000)
    return ["predict", "--config", good.config, "--checkpoint", checkpoint]


def _without_scale(good: "Checkpoints", folder: Path) -> Command:
    target = folder / "checkpoint"
    shutil.copytree(good.int8, target)
    tensors = load_file(target / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return ["predict", "--checkpoint", target]


def _with_generation_config(text: str) -> Callable[["Checkpoints", Path], Command]:
    def make(good: "Checkpoints", folder: Path) -> Command:
        target = _copy_checkpoint(good, folder)
        (target / "generation_config.json").write_text(text)
        return ["predict", "--checkpoint", target, "--prompt", "tea"]

    return make


def _with_prompts(text: str, name: str = "prompts.txt") -> Callable[["Checkpoints", Path], Command]:
    def make(good: "Checkpoints", folder: Path) -> Command:
        (folder / name).write_text(text)
        return ["predict", "--config", good.config, "--checkpoint", good.float, "--prompts-file", folder / name]

    return make


def _without_rank_file(good: "Checkpoints", folder: Path) -> Command:
    target = folder / "checkpoint"
    shutil.copytree(good.float_three_ranks, target)
    (target / "rank_01_of_03.safetensors").unlink()
    return ["predict", "--config", good.config, "--checkpoint", target]


Q_PROJ, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"

MISTAKES = {
    "missing config": Mistake(
        lambda good, folder: ["predict", "--config", folder / "none.yaml", "--checkpoint", good.float], (r"none\.yaml does not exist",)
    ),
    "config that is not YAML": Mistake(_with_yaml(lambda text: text + "a: [1\n"), (r"changed\.yaml is not YAML", r"line \d+")),
    "unknown key": Mistake(
        _with_yaml(lambda text: text.replace("num_layers", "num_layer")),
        (r"model\.model_config\.num_layer is not a known key", r"did you mean model\.model_config\.num_layers\?"),
    ),
    "wrong type": Mistake(
        _with_yaml(lambda text: text.replace("num_heads: 9", "num_heads: nine")),
        (r"changed\.yaml", r"model\.model_config\.num_heads is 'nine'", "a whole number of at least 1"),
    ),
    "zero workers": Mistake(_predict("--workers", "0"), (r"--workers is 0", "at least 1")),
    "more workers than possible": Mistake(_predict("--workers", "10"), (r"\b10 ranks", r"\b9 query heads", r"\b1 to 9 all work")),
    "YAML that disagrees with the checkpoint": Mistake(
        _with_yaml(lambda text: text.replace("num_layers: 2", "num_layers: 7")), ("disagree", r"num_layers", r"is 7 against 2")
    ),
    "truncated file": Mistake(_truncated, (r"model\.safetensors is truncated", r"has \d+ bytes", r"ends at byte \d+", "copy it again")),
    "damaged generation_config.json": Mistake(_with_generation_config('{"eos_token_id": [2,'), (r"generation_config\.json is not JSON",)),
    "end of answers that is no id": Mistake(
        _with_generation_config('{"eos_token_id": ["</s>"]}'),
        (r"generation_config\.json: eos_token_id is \['</s>'\], but a whole number or a list of them is needed",),
    ),
    "missing tensor": Mistake(_with_tensors(lambda tensors: tensors.pop(Q_PROJ)), ("missing", re.escape(Q_PROJ))),
    "missing scale": Mistake(_without_scale, ("missing", re.escape("model.layers.1.mlp.up_proj.weight_scale"))),
    "missing rank file": Mistake(_without_rank_file, (r"rank_01_of_03\.safetensors does not exist",)),
    "unexpected tensor": Mistake(
        _with_tensors(lambda tensors: tensors.update({"model.layers.5.extra": torch.zeros(3)})), ("unexpected", r"model\.layers\.5\.extra")
    ),
    "wrong shape": Mistake(
        _with_tensors(lambda tensors: tensors.update({GATE: torch.zeros(400, 140)})), (re.escape(GATE), r"\[400, 140\]", r"\[400, 144\]")
    ),
    "wrong dtype": Mistake(
        _with_tensors(lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int32)})), (re.escape(GATE), "int32", "float32")
    ),
    "missing checkpoint": Mistake(
        lambda good, folder: ["predict", "--config", good.config, "--checkpoint", folder / "none"], (r"none does not exist",)
    ),
    "empty prompts file": Mistake(_with_prompts("\n  \n"), (r"prompts\.txt holds no prompt",)),
    "prompts file without prompts": Mistake(_with_prompts('{"text": "a"}\n', "prompts.jsonl"), (r"prompts\.jsonl, line 1", '"prompt"')),
    "prompt longer than the context": Mistake(
        _predict("--prompt", "x" * 3000), (r"prompt 0 has 3001 tokens", r"context is 2048", "shorten it")
    ),
    "unknown dtype": Mistake(_predict("--dtype", "float8"), ("--dtype is 'float8'", "float32, bfloat16, float16")),
    "unknown option": Mistake(_predict("--workerz", "2"), ("--workerz", "--workers"), usage=True),
    "option that is no number": Mistake(_predict("--workers", "two"), ("--workers", "integer"), usage=True),
    "rtn asked of a float checkpoint": Mistake(
        lambda good, folder: ["predict", "--config", good.int8_config, "--checkpoint", good.float],
        ("rtn", "float weights", "tandem quantize"),
    ),
    "quantize into an existing folder": Mistake(
        lambda good, folder: ["quantize", "--checkpoint", good.float, "-a", "rtn-a16w8", "--output", good.int8],
        (r"int8 exists already", "--overwrite"),
    ),
    "quantize what is quantized": Mistake(
        lambda good, folder: ["quantize", "--checkpoint", good.int8, "-a", "rtn-a16w8", "--output", folder / "twice"], ("quantized",)
    ),
    "unknown approach": Mistake(
        lambda good, folder: ["quantize", "--checkpoint", good.float, "-a", "int3", "--output", folder / "int3"], ("'int3'", "rtn-a16w8")
    ),
    "reshard for too many workers": Mistake(
        lambda good, folder: ["reshard", good.float, folder / "many", "--workers", "12"],
        (r"\b12 ranks", r"\b9 query heads", "1 to 9 all"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_ends_with_code_2_and_a_sentence_before_anything_starts(refuse: Callable[..., None], mistake: Mistake) -> None:
    refuse(mistake.make, mistake.names, mistake.usage)


@pytest.mark.parametrize("name", ["missing config", "unknown option"])
def test_a_real_command_ends_so(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, name: str) -> None:
    mistake = MISTAKES[name]
    _check_refusal(tandem.run(*mistake.make(checkpoints, tmp_path), cwd=tmp_path), mistake)


def _check_refusal(result: subprocess.CompletedProcess[str], mistake: Mistake) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message = " ".join(result.stderr.split())
    for name in mistake.names:
        assert re.search(name, message), f"{name!r} is not in {message!r}"
    if not mistake.usage:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("tandem: ")
        assert len(re.findall(r"[.?!](?= [A-Z])", lines[0])) <= 1, "more than two sentences"


def test_run_predict_with_an_unknown_mode_names_the_two_modes(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    script = PROJECT_ROOT / "scripts" / "run_predict.sh"
    result = tandem.run_command(["bash", script, "both", checkpoints.config, checkpoints.float, "2"], cwd=tmp_path)
    _check_refusal(replace_program(result), replace(MISTAKES["missing config"], names=("'single'", "'parallel'", "'both'")))
    assert list(tmp_path.iterdir()) == []


def replace_program(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The script speaks under its own name."""
    assert result.stderr.startswith("run_predict.sh: ")
    stderr = result.stderr.replace("run_predict.sh: ", "tandem: ", 1)
    return subprocess.CompletedProcess(result.args, result.returncode, result.stdout, stderr)


def test_two_sources_that_disagree_on_the_number_of_ranks_are_both_named(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path
) -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    result = tandem.run("predict", "--checkpoint", checkpoints.float, "--workers", "3", "--prompt", "x", cwd=tmp_path, **rank)
    _check_refusal(result, replace(MISTAKES["missing config"], names=("--workers is 3", "WORLD_SIZE is 2")))
    assert list(tmp_path.iterdir()) == []


def test_the_unchanged_input_is_not_refused(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """Without this, every refusal above could come of something else."""
    outcome = tandem.predict("--config", checkpoints.config, "--checkpoint", checkpoints.float, "--workers", "1", "--max-new-tokens", "2")
    assert json.loads(outcome.jsonl.splitlines()[0])["finish_reason"] == "length"
