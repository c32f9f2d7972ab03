"""Decode one checkpoint as transformers does, as ranks in threads of this process do, and as the command line does.

Options are drawn so that they must not change a token: batches, blocks, shared prefixes, speculation, resumed tokens.
"""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed import HashStore

from differential_formats import Written
from differential_models import EXPERTS, ROUTERS, count_experts
from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.stored_facts import check_facts
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.engine.generation import Engine, step_all
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.kernels.library import kernels_disabled
from model.layers.batch import Span
from model.spec.config import build_config, count_blocks
from model.spec.scheme import read_scheme
from model.text.end_of_text import decide_end_of_text
from parallel.collectives import Collectives, IdentityCollectives
from parallel.shared_memory import SharedMemoryCollectives

_TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Prompts and options."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    """Of each prompt at most."""
    repetition_penalty: float
    batch_size: int
    block_size: int
    spare_blocks: int | None
    """Blocks more than the largest prompt needs; None: room for all."""
    share_prefixes: bool
    speculate: bool
    prefill_tokens: int
    plain: bool
    """Without the project's own kernels."""
    known: int
    """Tokens of each answer to resume behind."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Ids that end answers."""

    eos: tuple[int, ...]
    stop: tuple[int, ...]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Answers:
    """Reference answers from transformers."""

    rows: list[list[int]]
    """New tokens of each prompt, without ends."""
    scores: list[torch.Tensor]
    """[new tokens, vocab] of each prompt: logits after penalties; the largest is chosen."""
    logits: list[torch.Tensor]
    """[tokens, vocab] of each prompt with its new tokens."""

    def end(self, ends: Ends) -> list[list[int]]:
        """The rows as far as the first end."""
        stops = {*ends.stop, *(() if ends.ignore_eos else ends.eos)}
        cut = [next((place + 1 for place, token in enumerate(row) if token in stops), len(row)) for row in self.rows]
        return [row[:length] for row, length in zip(self.rows, cut, strict=True)]


@dataclass(frozen=True, slots=True)
class Found:
    """Answers of tandem on one rank."""

    rows: list[list[int]]
    logits: list[torch.Tensor]


def draw_run(random: random.Random, vocab: int) -> Drawn:
    """Prompts of any length with common beginnings, and options."""
    common = tuple(random.randrange(vocab) for _ in range(random.choice((0, 3, 17, 40))))
    prompts = []
    for _ in range(random.randint(1, 4)):
        own = tuple(random.randrange(vocab) for _ in range(random.randint(1, 20)))
        prompts.append(common + (own * random.choice((1, 1, 3)))[:50])
    return Drawn(
        prompts=tuple(prompts),
        new_tokens=tuple(random.randint(1, 14) for _ in prompts),
        repetition_penalty=random.choice((1.0, 1.0, 1.3, 0.8)),
        batch_size=random.randint(1, len(prompts) + 1),
        block_size=random.choice((16, 16, 32, 48)),
        spare_blocks=random.choice((None, None, 0, 1, 3)),
        share_prefixes=random.random() < 0.7,
        speculate=random.random() < 0.5,
        prefill_tokens=random.choice((512, 64, 7, 1)),
        plain=random.random() < 0.08,
        known=random.choice((0, 0, 0, 2)),
    )


def decode_with_transformers(written: Written, values: Mapping[str, Any], run: Drawn) -> Answers:
    """Greedy, in float32, each prompt alone."""
    heads = values["num_attention_heads"]
    # transformers builds models whose hidden size does not divide by the heads, but refuses to begin with such numbers.
    changed = {"tie_word_embeddings": False, "eos_token_id": None, "num_attention_heads": values["hidden_size"]}
    given = {key: value for key, value in {**values, **changed}.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(values["model_type"], **given)
    config.num_attention_heads = heads
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    model.load_state_dict(_stack_experts(written.weights, values), strict=True)
    rows, scores, logits = [], [], []
    with torch.inference_mode():
        for prompt, count in zip(run.prompts, run.new_tokens, strict=True):
            settings = transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=count,
                repetition_penalty=run.repetition_penalty,
                eos_token_id=None,
                bos_token_id=None,
                pad_token_id=None,
                return_dict_in_generate=True,
                output_scores=True,
            )
            ids = torch.tensor([prompt])
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            rows.append(found.sequences[0, len(prompt) :].tolist())
            scores.append(torch.cat(found.scores))
            logits.append(model(found.sequences).logits[0])
    return Answers(rows, scores, logits)


def _stack_experts(weights: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Names and shapes of transformers' modules, which hold the experts of a layer in two tensors."""
    kind, out = values["model_type"], dict(weights)
    for layer in range(values["num_hidden_layers"] if kind in EXPERTS else 0):
        prefix = f"model.layers.{layer}."
        found = [[out.pop(f"{prefix}{name.format(one)}.weight") for name in EXPERTS[kind]] for one in range(count_experts(values))]
        out[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in found])
        out[f"{prefix}mlp.experts.down_proj"] = torch.stack([down for _, _, down in found])
        out[f"{prefix}mlp.gate.weight"] = out.pop(f"{prefix}{ROUTERS[kind]}.weight")
    return out


def write_ends(path: Path, ends: Ends, random: random.Random) -> bool:
    """Put the ids into config.json, generation_config.json or both; False where the format has neither."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    values = json.loads((path / "config.json").read_text())
    values["eos_token_id"] = None
    first, second = list(ends.eos), list(ends.eos)
    place = random.choice(("config", "generation", "both"))
    if place == "both" and len(first) > 1:
        first, second = first[:1], second[1:]
    if place != "generation":
        values["eos_token_id"] = first[0] if len(first) == 1 and random.random() < 0.5 else first
    if place != "config":
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": second}))
    (path / "config.json").write_text(json.dumps(values))
    return True


def decode_in_threads(written: Written, run: Drawn, ends: Ends, expected: Answers, world_size: int) -> list[Found]:
    """Decode on every rank; ranks are threads with shared memory between them."""
    store = HashStore()

    def run_rank(rank: int) -> Found:
        torch.set_num_threads(1)
        if world_size == 1:
            return _decode(written, run, ends, expected, IdentityCollectives())
        collectives = SharedMemoryCollectives(store, rank, world_size, _TIMEOUT_SECONDS)
        try:
            return _decode(written, run, ends, expected, collectives)
        finally:
            collectives.close()

    with kernels_disabled() if run.plain else nullcontext():
        if world_size == 1:
            return [run_rank(0)]
        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(run_rank, range(world_size)))


def _decode(written: Written, run: Drawn, ends: Ends, expected: Answers, collectives: Collectives) -> Found:
    source = open_checkpoint(written.path, written.options)
    config, scheme = build_config(source.config), read_scheme(source.config)
    named = None if written.path.is_dir() and (written.path / "config.json").is_file() else list(ends.eos)
    config = replace(config, eos_token_ids=decide_end_of_text(source, config.vocab_size, named=named).ids, pad_token_id=None)
    check_checkpoint(source, config, scheme)
    check_facts(source, config, scheme)
    model = LlamaForCausalLM(config, scheme, collectives, dtype="float32", device=torch.device("cpu"), num_threads=1)
    load_model(model, source)
    requests = [
        Request(
            index,
            prompt,
            SamplingParams(
                max_new_tokens=count,
                repetition_penalty=run.repetition_penalty,
                ignore_eos=ends.ignore_eos,
                stop_token_ids=ends.stop,
            ),
            resumed_ids=tuple(answer[: min(run.known, len(answer) - 1)]),
        )
        for index, (prompt, count, answer) in enumerate(zip(run.prompts, run.new_tokens, expected.end(ends), strict=True))
    ]
    largest = max(count_blocks(request.cached_tokens, run.block_size) for request in requests)
    engine = Engine(
        model,
        run.batch_size,
        block_size=run.block_size,
        num_blocks=None if run.spare_blocks is None else largest + run.spare_blocks,
        share_prefixes=run.share_prefixes,
        speculate=run.speculate,
        prefill_tokens=run.prefill_tokens,
        prefill_resumed=model.batch_invariant,
    )
    rows = [list(request.resumed_ids) for request in requests]
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for event in step_all(engine):
            rows[event.index].append(event.token_id)
    return Found(rows, [_compute_logits(model, [*prompt, *row]) for prompt, row in zip(run.prompts, expected.rows, strict=True)])


def _compute_logits(model: LlamaForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    """float32 [tokens, vocab]."""
    local = model.logits_local(model([Span(model.build_cache(len(ids)), list(ids))]))
    return model.collectives.gather_columns(local, model.shares.vocab).float()


def decode_with_commands(folder: Path, written: Written, run: Drawn, ends: Ends, world_size: int) -> list[list[int]]:
    """Decode with `tandem predict`. The checkpoint is a folder with config.json; a tokenizer of words t0, t1, ... is added to it."""
    values = json.loads((written.path / "config.json").read_text())
    vocabulary = {f"t{place}": place for place in range(values["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(written.path / "tokenizer.json"))
    command = [sys.executable, "-m", "launcher", "predict", "--checkpoint", str(written.path), "--workers", str(world_size), "--greedy"]
    command += ["--dtype", "float32", "--output", str(folder / "out.jsonl"), "--log-dir", str(folder / "log")]
    command += ["--max-new-tokens", str(max(run.new_tokens)), "--repetition-penalty", str(run.repetition_penalty)]
    command += ["--block-size", str(run.block_size), "--max-batch-size", str(run.batch_size)]
    command += ["--ignore-eos"] if ends.ignore_eos else []
    command += ["--speculate"] if run.speculate else []
    for prompt in run.prompts:
        command += ["--prompt", " ".join(f"t{token}" for token in prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"tandem predict exits with {done.returncode}: {done.stderr.strip()[-500:]}")
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    for record, prompt in zip(records, run.prompts, strict=True):
        if tuple(record["prompt_token_ids"]) != prompt:
            raise RuntimeError(f"prompt {prompt} became {record['prompt_token_ids']}")
    return [record["token_ids"] for record in records]
