"""`--draft-model`: the same tokens as without it, on any number of ranks, after a rank's death and from Python; and what is refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tandem import LLM, SamplingParams

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

BEGINS = ("Once upon a time", "Tom and Lily went to the park", "The dog", "One day, a little girl named Sue found a big red")
PROMPTS = [f"{begin}{end}" for begin in BEGINS for end in ("", " and", ". He was")]
SAMPLED = ("--do-sample", "--top-k", "0", "--temperature", "0.8", "--seed", "7")


@pytest.fixture(scope="module")
def draft(stories: Path, keep_layers: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep_layers(stories, 4, tmp_path_factory.mktemp("draft") / "stories-4-layers")


def predict(tandem: "Tandem", stories: Path, *options: str | Path) -> "Outcome":
    prompts = tandem.folder / "drafted.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return tandem.predict(
        *("--checkpoint", stories, "--prompts-file", prompts, "--threads-per-rank", "1", "--dtype", "float32"),
        *("--max-new-tokens", "32", "--max-batch-size", "5", *options),
    )


@pytest.mark.parametrize("rules", [("--logprobs",), SAMPLED], ids=["greedy", "sampled"])
def test_ranks_with_a_draft_model_write_what_one_without_it_writes(
    tandem: "Tandem", stories: Path, draft: Path, rules: Sequence[str]
) -> None:
    plain = predict(tandem, stories, "--workers", "1", *rules)
    drafted = predict(tandem, stories, "--workers", "2", "--draft-model", draft, "--draft-tokens", "3", *rules)
    assert drafted.jsonl == plain.jsonl
    assert plain.stats["acceptance_rate"] is None and plain.stats["draft_weight_bytes"] == [0]
    stats = drafted.stats
    if "warning: --draft-model has no effect" in drafted.stderr:
        assert stats["speculated_tokens"] == 0
        return
    assert 0 < stats["accepted_tokens"] < stats["speculated_tokens"]
    assert stats["acceptance_rate"] == stats["accepted_tokens"] / stats["speculated_tokens"]
    assert all(0 < small < large for small, large in zip(stats["draft_weight_bytes"], stats["weight_bytes"], strict=True))
    assert sum(stats["kv_cache_bytes_per_token"]) == 9 / 5 * plain.stats["kv_cache_bytes_per_token"][0], "of 5 layers and 4"


def test_a_killed_rank_changes_no_token(tandem: "Tandem", stories: Path, draft: Path) -> None:
    options = ("--checkpoint", stories, "--max-batch-size", "1", "--max-new-tokens", "100", "--ignore-eos", "--dtype", "float32", *SAMPLED)
    prompts = [word for prompt in BEGINS[:3] for word in ("--prompt", prompt)]
    plain = tandem.predict(*options, *prompts, "--workers", "1", "--threads-per-rank", "1")
    folder = tandem.new_folder()
    arguments = ("--workers", "2", "--threads-per-rank", "1", "--draft-model", draft, "--max-restarts", "1")
    running = tandem.start(tandem.predict_command(folder, *options, *prompts, *arguments))
    assert running.process.stdout is not None
    running.process.stdout.readline()  # the first prompt is done
    os.kill(running.find_ranks()[1], signal.SIGKILL)
    _, stderr = running.process.communicate(timeout=120)
    assert running.process.returncode == 0, stderr
    assert "rank 1 reloads, then all" in stderr and "draft-model has no effect" not in stderr
    assert (folder / "results.jsonl").read_text() == plain.jsonl
    assert json.loads((folder / "stats.json").read_text())["accepted_tokens"] > 0


def test_python_takes_a_draft_model_by_both_names(tandem: "Tandem", stories: Path, draft: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, n=2, stop=[" the "])
    with LLM(stories, 1, dtype="float32", threads_per_rank=1, log_dir=tmp_path / "plain") as llm:
        plain = llm.generate(list(BEGINS), params)
    config = {"model": str(draft), "num_speculative_tokens": 5}
    with LLM(stories, 2, dtype="float32", threads_per_rank=1, log_dir=tmp_path / "drafted", speculative_config=config) as llm:
        drafted = llm.generate(list(BEGINS), params)
    assert drafted == plain


def _other_vocabulary(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
    shutil.copytree(checkpoints.float, folder / "other")
    tokenizer = json.loads((folder / "other" / "tokenizer.json").read_text())
    names = {number: name for name, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] |= {names[40]: 41, names[41]: 40}
    (folder / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ["predict", "--checkpoint", checkpoints.float, "--draft-model", folder / "other"]


def _without_tokenizer(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
    shutil.copytree(checkpoints.float, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    return ["predict", "--checkpoint", checkpoints.float, "--draft-model", folder / "bare"]


REFUSED = {
    "another vocabulary": (_other_vocabulary, ["other has another vocabulary than the model: its token 40 is '.' and not '.'; give"]),
    "no tokenizer": (_without_tokenizer, ["bare has no tokenizer"]),
    "no such model": (lambda c, f: ["predict", "--checkpoint", c.float, "--draft-model", f / "none"], ["none does not exist"]),
    "an empty name": (lambda c, f: ["predict", "--checkpoint", c.float, "--draft-model", ""], ["--draft-model is an empty text"]),
    "tokens without a model": (
        lambda c, f: ["predict", "--checkpoint", c.float, "--draft-tokens", "2"],
        ["--draft-tokens is 2, but there is no draft model: give --draft-model"],
    ),
    "two ways to draft": (
        lambda c, f: ["predict", "--checkpoint", c.float, "--draft-model", c.int8, "--speculate"],
        ["--speculate and --draft-model both draft tokens: give one"],
    ),
    "random weights": (
        lambda c, f: ["bench", "--random-weights", "--model-config", c.float / "config.json", "--draft-model", c.int8],
        ["--draft-model cannot be combined with --random-weights"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_draft_is_refused_before_anything_starts(refuse: Callable[..., None], name: str) -> None:
    make, names = REFUSED[name]
    refuse(make, names, usage=False)


def test_a_draft_model_with_too_few_parts_for_the_ranks_is_refused(tandem: "Tandem", stories: Path, checkpoints: "Checkpoints") -> None:
    """The tiny model has 9 query heads, the other one 8."""
    words = ("predict", "--checkpoint", checkpoints.float, "--prompt", "a", "--workers", "9", "--draft-model", stories)
    result = tandem.run(*words)
    assert result.returncode == 2
    assert result.stderr.startswith(f"tandem: the draft model {stories} has too few parts: ") and "8 query heads" in result.stderr


def test_plan_counts_the_draft_model(tandem: "Tandem", stories: Path, draft: Path) -> None:
    plain = json.loads(tandem.run("plan", stories, "--workers", "2", "--json").stdout)
    both = json.loads(tandem.run("plan", stories, "--workers", "2", "--draft-model", draft, "--json").stdout)
    small = both.pop("draft_model")
    for rank, (one, two) in enumerate(zip(plain["ranks"], both["ranks"], strict=True)):
        for name in ("file_bytes", "weight_bytes", "kv_cache_bytes"):
            assert two[name] - one[name] == small[name][rank] > 0
        assert two["peak_bytes"] - one["peak_bytes"] == small["weight_bytes"][rank] + small["kv_cache_bytes"][rank]
    assert "of these, the draft model, by rank: reads " in tandem.run("plan", stories, "--draft-model", draft).stdout


def test_bench_measures_the_gain(tandem: "Tandem", stories: Path, draft: Path) -> None:
    words = ("--workers", "2", "--batch-size", "1", "--rounds", "1", "--new-tokens", "4", "--prompt-tokens", "8", "--json")
    result = tandem.run("bench", stories, "--draft-model", draft, *words, "--log-dir", tandem.new_folder() / "logs")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["speculation"]
    if rows is None:
        assert "warning: --draft-model has no effect" in result.stderr
        return
    assert [row["prompt"] for row in rows] == ["copy", "free"]
    assert all(row["identical"] and 0 <= row["accepted_share"] < 1 for row in rows) and rows[0]["accepted_share"] > 0
