"""Many prompts of mixed length through `tandem predict`: batches, little memory and shared beginnings change no token."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Outcome, Tandem

WORDS = "Once upon a time there was a little girl who liked to play in the park with her big red ball and her dog".split()
BEGIN = " ".join(WORDS[:12])
PROMPTS = [
    *(" ".join((WORDS * 4)[start : start + 1 + 7 * start % 60]) for start in range(20)),
    *(f"{BEGIN} {word} {WORDS[-place]}" for place, word in enumerate(WORDS[:10], 1)),
]


def _run(tandem: "Tandem", stories: Path, *options: str) -> "Outcome":
    prompts = tandem.folder / "mixed.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return tandem.predict(
        *("--checkpoint", stories, "--prompts-file", prompts, "--threads-per-rank", "1", "--dtype", "float32"),
        *("--max-new-tokens", "24", "--max-batch-size", "8", *options),
    )


def test_two_ranks_write_what_one_writes_bit_for_bit(tandem: "Tandem", stories: Path) -> None:
    one, two = (_run(tandem, stories, "--workers", workers, "--logprobs", "--num-blocks", "30") for workers in ("1", "2"))
    assert [record["prompt"] for record in one.records] == PROMPTS
    assert two.jsonl == one.jsonl and two.stdout == one.stdout


def test_memory_sharing_and_guesses_change_no_token(tandem: "Tandem", stories: Path) -> None:
    usual = _run(tandem, stories, "--workers", "1")
    other = _run(tandem, stories, "--workers", "1", "--num-blocks", "14", "--block-size", "16", "--no-prefix-cache", "--speculate")
    assert other.jsonl == usual.jsonl
    assert usual.stats["speculated_tokens"] == usual.stats["accepted_tokens"] == 0
    assert other.stats["speculated_tokens"] or "warning: --speculate has no effect" in other.stderr


def test_a_cache_that_no_prompt_fits_is_refused_before_anything_starts(tandem: "Tandem", stories: Path) -> None:
    for options, words in (
        (("--num-blocks", "2"), "the key-value cache holds 2 blocks of 16 = 32 tokens"),
        (("--block-size", "20"), "block_size is 20, but has to be a multiple of 16"),
        (("--num-blocks", "0"), "num_blocks is 0, but has to be at least 1"),
    ):
        result = tandem.run("predict", "--checkpoint", stories, "--prompt", BEGIN, "--max-new-tokens", "40", *options)
        assert result.returncode == 2 and words in result.stderr
