"""`tandem predict` on a tiny checkpoint: the same bits for every number of ranks, and the files that a run leaves."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

DEFAULT_PROMPTS = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
NUM_NEW = 24
RECORD_FIELDS = ["index", "prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"]
STATS_FIELDS = {
    "world_size",
    "threads_per_rank",
    "cores_bound",
    "device",
    "dtype",
    "quantization",
    "kernel",
    "collectives",
    "load_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token_seconds",
    "speculated_tokens",
    "accepted_tokens",
    "acceptance_rate",
    "weight_bytes",
    "draft_weight_bytes",
    "adapter_bytes",
    "read_bytes",
    "peak_rss_bytes",
    "peak_device_bytes",
    "restarts",
    "recovery_seconds",
    "kv_cache_dtype",
    "kv_cache_bytes_per_token",
}

# name: (form of the checkpoint, YAML, options, variables, ranks, collectives). The YAML asks for three ranks, so each run also
# shows who decides on their number: --workers over MS_WORKER_NUM over the YAML.
RUNS = {
    "float, 1 rank": ("float", "config", ["--workers", "1"], {"MS_WORKER_NUM": "2"}, 1, "identity"),
    "float, 2 ranks, shm": ("float", "config", ["--collectives", "shm"], {"MS_WORKER_NUM": "2"}, 2, "shm"),
    "float, 2 ranks, gloo": ("float_three_ranks", "config", ["--workers", "2", "--collectives", "gloo"], {}, 2, "gloo"),
    "float, 3 ranks, shm": ("float_three_ranks", "config", [], {}, 3, "shm"),
    "int8, 1 rank": ("int8", "int8_config", ["--workers", "1"], {}, 1, "identity"),
    "int8, 2 ranks, shm": ("int8_two_ranks", "int8_config", ["--workers", "2"], {"MS_WORKER_NUM": "3"}, 2, "shm"),
    "int8, 3 ranks, gloo": ("int8", "int8_config", ["--collectives", "gloo"], {}, 3, "gloo"),
}
BASE = {"float": "float, 1 rank", "int8": "int8, 1 rank"}


def _get_run(tandem: "Tandem", checkpoints: "Checkpoints", name: str) -> "Outcome":
    form, config, options, variables, _, _ = RUNS[name]
    dtype = "float32" if config == "config" else "bfloat16"
    return tandem.predict(
        *("--config", getattr(checkpoints, config), "--checkpoint", getattr(checkpoints, form)),
        *("--max-new-tokens", str(NUM_NEW), "--dtype", dtype, "--logprobs", *options),
        **variables,
    )


@pytest.fixture(scope="session", params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    """One of RUNS."""
    return str(request.param)


@pytest.fixture(scope="session")
def run(tandem: "Tandem", checkpoints: "Checkpoints", name: str) -> "Outcome":
    """The run of that name."""
    return _get_run(tandem, checkpoints, name)


def test_any_number_of_ranks_and_any_collectives_write_the_same_results_bit_for_bit(
    tandem: "Tandem", checkpoints: "Checkpoints", name: str, run: "Outcome"
) -> None:
    base = _get_run(tandem, checkpoints, BASE[name.partition(",")[0]])
    assert run.jsonl == base.jsonl
    assert run.stdout == base.stdout


def test_stdout_holds_one_line_a_prompt_in_order_and_nothing_else(run: "Outcome") -> None:
    assert run.texts == [record["prompt"] + record["text"] for record in run.records]
    assert [record["prompt"] for record in run.records] == DEFAULT_PROMPTS


def test_jsonl_has_the_fields_of_the_contract(run: "Outcome", checkpoints: "Checkpoints") -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoints.float / "tokenizer.json"))
    for index, record in enumerate(run.records):
        assert list(record) == [*RECORD_FIELDS, "logprobs"]
        assert record["index"] == index
        assert record["prompt_token_ids"] == tokenizer.encode(record["prompt"]).ids
        assert len(record["token_ids"]) == NUM_NEW
        assert record["text"] == tokenizer.decode(record["prompt_token_ids"] + record["token_ids"])[len(record["prompt"]) :]
        assert record["finish_reason"] == "length"
        assert len(record["logprobs"]) == NUM_NEW
        assert all(value <= 0 for value in record["logprobs"])


def test_stats_are_complete_and_name_the_kernel_and_the_collectives(name: str, run: "Outcome") -> None:
    _, config, _, _, ranks, collectives = RUNS[name]
    stats = run.stats
    assert stats.keys() == STATS_FIELDS
    assert (stats["world_size"], stats["collectives"], stats["device"], stats["restarts"]) == (ranks, collectives, "cpu", 0)
    assert stats["quantization"] == ("none" if config == "config" else "rtn-a16w8")
    assert stats["dtype"] == ("float32" if config == "config" else "bfloat16")
    assert stats["kernel"] in ("native-float32", "torch-float32") if config == "config" else "int8" in stats["kernel"]
    for key in ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds"):
        assert stats[key] > 0
    for key in ("weight_bytes", "read_bytes", "peak_rss_bytes"):
        assert len(stats[key]) == ranks
        assert all(value > 0 for value in stats[key])


@pytest.mark.parametrize("name", ["float, 3 ranks, shm", "int8, 2 ranks, shm"], scope="session")
def test_each_rank_reads_little_more_than_its_rank_file(name: str, run: "Outcome", checkpoints: "Checkpoints") -> None:
    files = sorted(getattr(checkpoints, RUNS[name][0]).glob("rank_*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == len(run.stats["read_bytes"])
    for read_bytes, size in zip(run.stats["read_bytes"], sizes, strict=True):
        assert 0.8 * size < read_bytes < 1.1 * size


def test_a_rank_reads_only_its_part_of_a_checkpoint_that_was_never_resharded(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """int8 on three ranks out of one file: no rank comes near the whole of it."""
    whole = (checkpoints.int8 / "model.safetensors").stat().st_size
    assert all(value < 0.6 * whole for value in _get_run(tandem, checkpoints, "int8, 3 ranks, gloo").stats["read_bytes"])


def test_logs_of_all_ranks_are_private(name: str, run: "Outcome") -> None:
    assert stat.S_IMODE(run.logs.stat().st_mode) == 0o700
    assert sorted(path.name for path in run.logs.iterdir()) == [f"worker_{rank}.log" for rank in range(RUNS[name][4])]


def test_float32_takes_the_tokens_of_transformers(
    tandem: "Tandem", checkpoints: "Checkpoints", choose_with_transformers: Callable[..., list[list[int]]]
) -> None:
    records = _get_run(tandem, checkpoints, "float, 1 rank").records
    prompts = [record["prompt_token_ids"] for record in records]
    tokens = [record["token_ids"] for record in records]
    assert choose_with_transformers(checkpoints.float, prompts, tokens) == tokens


def test_torchrun_gives_the_same_results_and_its_single_thread_is_no_limit(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    outcome = tandem.predict(
        *("--config", checkpoints.config, "--checkpoint", checkpoints.float),
        *("--max-new-tokens", str(NUM_NEW), "--dtype", "float32", "--logprobs"),
        module=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launcher"),
        OMP_NUM_THREADS="1",  # what torchrun sets by itself where nobody does
    )
    base = _get_run(tandem, checkpoints, "float, 1 rank")
    assert outcome.jsonl == base.jsonl
    assert outcome.stdout == base.stdout
    assert outcome.stats["world_size"] == 2
    assert outcome.stats["threads_per_rank"] == max(1, _count_cores() // 2)


def test_sampling_depends_on_the_seed_alone_and_prompts_come_from_a_file(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """Three runs: two ranks and one with the same seed, one with another; prompts as lines and as JSONL."""
    prompts = ['It\'s "quoted" and \\ has ünïcödé 🚲', "  two   blanks  "]
    lines, objects = tandem.folder / "prompts.txt", tandem.folder / "prompts.jsonl"
    lines.write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    objects.write_text("".join(json.dumps({"prompt": prompt, "id": 7}) + "\n" for prompt in prompts), encoding="utf-8")

    def sample(path: Path, seed: str, workers: str) -> "Outcome":
        options = ("--do-sample", "--seed", seed, "--temperature", "1.5", "--top-k", "0", "--top-p", "0.95", "--max-new-tokens", "16")
        return tandem.predict(
            "--checkpoint", checkpoints.float, "--prompts-file", path, "--workers", workers, "--threads-per-rank", "1", *options
        )

    one, two, other = sample(lines, "7", "1"), sample(objects, "7", "2"), sample(lines, "8", "1")
    assert [record["prompt"] for record in one.records] == prompts
    assert one.texts == [record["prompt"] + record["text"] for record in one.records]
    assert list(one.records[0]) == RECORD_FIELDS
    assert two.jsonl == one.jsonl
    assert two.stdout == one.stdout
    assert other.jsonl != one.jsonl


def test_a_sequence_ends_with_the_end_token_unless_told_to_go_on(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    """The checkpoint's end token is made the fifth one that it is known to take."""
    usual = _get_run(tandem, checkpoints, "float, 1 rank").records[0]["token_ids"]
    end = usual[4]
    first = usual.index(end) + 1
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints.float, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [299, end]}))
    arguments = ("--checkpoint", folder, "--dtype", "float32", "--prompt", DEFAULT_PROMPTS[0], "--max-new-tokens", "12")
    (stopped,) = tandem.predict(*arguments).records
    assert (stopped["token_ids"], stopped["finish_reason"]) == (usual[:first], "eos")
    (went_on,) = tandem.predict(*arguments, "--ignore-eos").records
    assert (went_on["token_ids"], went_on["finish_reason"]) == (usual[:12], "length")


def test_the_end_token_of_the_yaml_goes_over_that_of_the_checkpoint(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    usual = _get_run(tandem, checkpoints, "float, 1 rank").records[0]["token_ids"]
    config = tmp_path / "eos.yaml"
    config.write_text(checkpoints.config.read_text().replace("    do_sample:", f"    eos_token_id: {usual[4]}\n    do_sample:"))
    options = ("--workers", "1", "--threads-per-rank", "1", "--prompt", DEFAULT_PROMPTS[0], "--max-new-tokens", "12")
    (record,) = tandem.predict("--config", config, "--checkpoint", checkpoints.float, *options).records
    assert (record["token_ids"], record["finish_reason"]) == (usual[: usual.index(usual[4]) + 1], "eos")


def _count_cores() -> int:
    """Those that this process may use, with the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
