"""Differential test: random small models, formats and options, decoded by tandem on 1 and 3 ranks and by transformers.

    python scripts/bench/differential.py [--count 300] [--seed 0] [--only 17] [--formats gguf,awq] [--commands 6]

Greedy, in float32; for quantized formats transformers runs on the dequantized weights. Combination N of a seed is always the same:
`--only N` repeats it. Prints every combination that differs, then a summary; exit code 1 where one differs. Tokens may differ only
where transformers' own scores are within 1e-4 of a tie; such combinations are counted. A few run through `tandem predict`.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers

from differential_formats import TESTED
from differential_models import DrawnModel, draw_model
from differential_runs import (
    Answers,
    Drawn,
    Ends,
    Found,
    decode_in_threads,
    decode_with_commands,
    decode_with_transformers,
    draw_run,
    write_ends,
)

TIE = 1e-4
"""Of scores: closer ones may be taken either way."""
LOGITS_TOLERANCE = 1e-3
"""Largest difference of logits, which have a standard deviation of about 3."""
WORLD_SIZES = (1, 3)
_WITH_COMMANDS = ("hf", "compressed-tensors", "gptq", "awq", "ranks")


@dataclass(slots=True)
class Outcome:
    """The result of one combination."""

    format: str
    words: str
    """Describes it."""
    problems: list[str] = field(default_factory=list)
    ties: int = 0
    error: float = 0.0
    """Largest difference of logits."""


def run_combination(seed: int, number: int, formats: Sequence[str], *, with_commands: bool = False) -> Outcome:
    """Draw, write, decode and compare one combination. A failure of any kind is a problem of the outcome."""
    rng = random.Random(f"{seed}/{number}")
    names = [name for name in formats if not with_commands or name in _WITH_COMMANDS]
    name = names[number % len(names)]
    model = draw_model(rng, TESTED[name].limits)
    run = draw_run(rng, model.values["vocab_size"])
    folder = Path(tempfile.mkdtemp(prefix="differential-"))
    outcome = Outcome(name, _describe(model))
    try:
        (folder / "model").mkdir()
        written = TESTED[name].write(folder / "model", model, rng)
        if with_commands:
            run = replace(run, new_tokens=(max(run.new_tokens),) * len(run.prompts))
        answers = decode_with_transformers(written, model.values, run)
        ends = _draw_ends(rng, answers, model.values["vocab_size"])
        ends = replace(ends, stop=()) if with_commands else ends
        write_ends(written.path, ends, rng)
        outcome.words += f", {_describe_run(run, ends)}"
        if with_commands:
            for world_size in WORLD_SIZES:
                rows = decode_with_commands(folder, written, run, ends, world_size)
                _compare_rows(outcome, f"tandem predict --workers {world_size}", rows, answers, ends)
            return outcome
        alone: Found | None = None
        for world_size in WORLD_SIZES:
            for rank, found in enumerate(decode_in_threads(written, run, ends, answers, world_size)):
                place = f"rank {rank} of {world_size}"
                _compare_rows(outcome, place, found.rows, answers, ends)
                _compare_logits(outcome, place, found, answers)
                alone = alone or found
                if not run.plain and found.rows != alone.rows:
                    outcome.problems.append(f"{place} decodes other tokens than one rank: {found.rows}, not {alone.rows}")
                if not run.plain and not all(map(torch.equal, found.logits, alone.logits)):
                    outcome.problems.append(f"{place}: logits are not those of one rank bit for bit")
    except Exception as error:
        where = traceback.format_exc().strip().splitlines()[-3:-1]
        outcome.problems.append(f"{type(error).__name__}: {error} ({' '.join(line.strip() for line in where)})")
    finally:
        shutil.rmtree(folder)
    return outcome


def _describe(model: DrawnModel) -> str:
    values = model.values
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps")
    rope = values.get("rope_parameters") or {**values.get("rope_scaling", {}), "rope_theta": values["rope_theta"]}
    flags = [key for key in ("tie_word_embeddings", "attention_bias", "mlp_bias") if values.get(key)]
    flags += [
        f"{key}={values[key]}" for key in ("sliding_window", "layer_types", "max_window_layers", "num_experts_per_tok") if key in values
    ]
    return " ".join([values["model_type"], *(f"{key}={values[key]}" for key in keys), f"rope={rope}", *flags])


def _describe_run(run: Drawn, ends: Ends) -> str:
    values = asdict(run)
    lengths = [len(prompt) for prompt in values.pop("prompts")]
    return f"prompts={lengths} " + " ".join(f"{key}={value}" for key, value in {**values, **asdict(ends)}.items())


def _draw_ends(random: random.Random, answers: Answers, vocab: int) -> Ends:
    """Ids of which some stand in the answers."""
    said = [token for row in answers.rows for token in row]

    def draw(count: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys(random.choice(said) if random.random() < 0.4 else random.randrange(vocab) for _ in range(count)))

    return Ends(draw(random.randint(1, 3)), draw(random.choice((0, 0, 1, 2))), random.random() < 0.3)


def _compare_rows(outcome: Outcome, place: str, rows: Sequence[Sequence[int]], answers: Answers, ends: Ends) -> None:
    for index, (found, expected) in enumerate(zip(rows, answers.end(ends), strict=True)):
        if list(found) == expected:
            continue
        first = next((at for at, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other), None)
        if first is not None:
            scores = answers.scores[index][first]
            gap = float(scores[expected[first]] - scores[found[first]])
            if gap <= TIE:
                outcome.ties += 1
                continue
            outcome.problems.append(f"{place}: prompt {index} differs at token {first}, gap {gap:.5f}: {list(found)}, not {expected}")
        else:
            outcome.problems.append(f"{place}: prompt {index} ends elsewhere: {list(found)}, not {expected}")


def _compare_logits(outcome: Outcome, place: str, found: Found, answers: Answers) -> None:
    for index, (ours, theirs) in enumerate(zip(found.logits, answers.logits, strict=True)):
        error = float((ours - theirs).abs().max())
        outcome.error = max(outcome.error, error)
        if not error <= LOGITS_TOLERANCE:
            outcome.problems.append(f"{place}: logits of prompt {index} differ by {error:.5f}")


def main() -> int:
    """Run the combinations of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="combinations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="start of the random numbers (default: %(default)s)")
    parser.add_argument("--only", type=int, help="run this combination alone")
    parser.add_argument("--formats", default=",".join(TESTED), help="names, separated by commas (default: all)")
    parser.add_argument("--commands", type=int, default=6, help="combinations that run through `tandem predict` (default: %(default)s)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    formats = options.formats.split(",")
    numbers = range(options.count) if options.only is None else [options.only]
    through = {round(place * options.count / options.commands) for place in range(options.commands)} if options.commands else set()
    started, counts, ties, error, differing = time.monotonic(), Counter[str](), 0, 0.0, 0
    for number in numbers:
        outcome = run_combination(options.seed, number, formats, with_commands=number in through)
        counts[outcome.format] += 1
        ties, error, differing = ties + outcome.ties, max(error, outcome.error), differing + bool(outcome.problems)
        if outcome.problems or options.only is not None:
            print(f"combination {number} ({outcome.format}: {outcome.words})")
            for problem in outcome.problems[:6]:
                print(f"    {problem}")
            sys.stdout.flush()
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(
        f"{len(numbers)} combinations with seed {options.seed} in {time.monotonic() - started:.0f} s: {differing} differ, {ties} ties, "
        f"largest difference of logits {error:.2e} ({kinds}; {len(through & set(numbers))} through tandem predict)"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
