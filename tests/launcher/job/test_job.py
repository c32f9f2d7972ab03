"""A job travels as JSON from the parent to its ranks and comes back as the same value, whatever its task."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.job.codec import read_job, read_task, write
from launcher.job.job import DraftCheckpoint, Job
from launcher.job.tasks import Bench, Decode, Evaluate, Quantize, Task
from launcher.rendezvous.errors import DifferentRunError
from launcher.rendezvous.run_identity import compare_runs, describe_run
from model.checkpoint.fingerprint import Fingerprint
from model.checkpoint.formats import OpenOptions
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.quantization.recipe import Recipe
from model.spec.linear_scheme import LinearScheme

REQUESTS = (
    Request(0, (1, 5, 9), SamplingParams(max_new_tokens=3)),
    Request(1, (1,), SamplingParams(max_new_tokens=7, do_sample=True, temperature=0.1, top_k=0, top_p=0.95, seed=2**32 - 1, logprobs=True)),
    Request(2, (1, 2), SamplingParams(max_new_tokens=7), resumed_ids=(5, 0, 5)),
    Request(3, (3,), SamplingParams(max_new_tokens=7), resumed_ids=(4, 2), known_reason="eos"),
)
SMOOTH = Recipe(
    approach="ptq",
    linear=LinearScheme(packed=False, activation="tensor", activation_symmetric=False),
    kv_cache="channel",
    smooth=True,
    alpha=0.1,
    fold=True,
    not_converted=("lm_head", "w2"),
)
TASKS: dict[str, Task] = {
    "decode": Decode(REQUESTS),
    "perplexity": Evaluate(name="perplexity", rows=((1, 2, 3), (4, 5))),
    "boolq": Evaluate(name="boolq", rows=((1, 2), (3,)), answers=(True, False), choices=(7, 8)),
    "static": Quantize(recipe=SMOOTH, samples=((1, 2), (3,)), work_folder="/a b/.made.quantizing"),
    "int4": Quantize(
        recipe=Recipe(approach="awq", linear=LinearScheme(bits=4, group_size=16, symmetric=False), method="awq"),
        samples=(),
        work_folder="/w",
    ),
    "bench": Bench(batch_sizes=(1, 8), prompt_tokens=5, new_tokens=7, rounds=3, random_values='{"hidden_size": 64}', command_started=1.5),
    "bench of speculation": Bench(batch_sizes=(1,), prompt_tokens=5, new_tokens=7, rounds=3, speculated=REQUESTS),
    "cache alone": Quantize(
        recipe=Recipe(approach="rtn-c8", linear=None, kv_cache="token", not_converted=()), samples=(), work_folder="/w"
    ),
}
JOB = Job(
    checkpoint="/some where/modèle",
    opening=OpenOptions(),
    fingerprint=Fingerprint("00ff", "abcd", {"/some where/modèle": (1 << 40, 1_764_000_000_000_000_001)}),
    kv_cache=None,
    world_size=3,
    context_tokens=2048,
    eos_token_ids=(2, 128009),
    pad_token_id=None,
    dtype="bfloat16",
    device="cpu",
    collectives="auto",
    threads_per_rank=None,
    cpu_kernels="auto",
    bind_cores=False,
    timeout_seconds=0.1,
    max_batch_size=16,
    block_size=32,
    num_blocks=None,
    prefix_cache=True,
    speculate=False,
    task=TASKS["decode"],
)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_comes_back_from_json_as_it_was(name: str) -> None:
    task = TASKS[name]
    back = read_task(write(task))
    assert back == task
    assert type(back) is type(task)
    assert hash(back) == hash(task), "rows and words are tuples again"


@pytest.mark.parametrize("name", TASKS)
def test_a_job_comes_back_from_json_as_it_was(name: str) -> None:
    job = replace(JOB, task=TASKS[name], kv_cache="token", threads_per_rank=2, pad_token_id=0)
    assert read_job(write(job)) == job


def test_values_that_stand_for_a_config_travel_too() -> None:
    job = replace(
        JOB,
        opening=OpenOptions(
            format="mindspore",
            key_file="/keys/key",
            values={"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False},
        ),
    )
    back = read_job(write(job))
    assert back == job
    assert back.path == Path("/some where/modèle")


def test_a_draft_model_travels_too_and_only_its_content_has_to_be_the_same_everywhere() -> None:
    draft = DraftCheckpoint(checkpoint="/here/s", opening=OpenOptions(), fingerprint=Fingerprint("aa", "b", {}), kv_cache=None)
    here = replace(JOB, draft=draft, draft_tokens=6)
    assert read_job(write(here)) == here
    there = replace(here, draft=replace(draft, checkpoint="/there/s"))
    assert describe_run(there) == describe_run(here) != describe_run(JOB)
    assert describe_run(replace(here, draft_tokens=7)) != describe_run(here)
    other = replace(here, draft=replace(draft, fingerprint=Fingerprint("cc", "b", {})))
    with pytest.raises(DifferentRunError, match="draft model fingerprint cc, but rank 0 has aa: copy the same draft model to every node"):
        compare_runs("rank 1", describe_run(other), "rank 0", describe_run(here))


def test_json_is_one_line_that_names_the_task() -> None:
    text = write(JOB)
    assert "\n" not in text
    assert json.loads(text)["task"]["type"] == "Decode"
