"""`tandem predict`: decides a whole job from options, YAML, environment and headers, then runs it.

Everything that can be wrong is found here, before any process starts. Knows no typer: options come as a plain value.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.console import RunConsole
from launcher.environment import LaunchEnvironment, decide_world_size, read_environment
from launcher.job import Job
from launcher.rank_process import join_store
from launcher.settings import Settings, default_settings, read_settings
from launcher.spawning import RanksFailedError, spawn_ranks
from launcher.worker import run_rank, shared_memory_works
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.config import DTYPES, LlamaConfig, build_config
from model.generation import Request, check_request
from model.loading import check_checkpoint
from model.sampling import SamplingParams
from model.scheme import Scheme, read_scheme
from model.tokenizer import Tokenizer, read_tokenizer
from parallel.errors import ConfigError, RequestError

DEFAULT_PROMPTS = ("I love Beijing, because", "LLaMA is a", "Huawei is a company that")
"""MindFormers' run_llama2_generate.py's."""
DEFAULT_MAX_LENGTH = 1024
"""MindFormers' LlamaConfig.max_decode_length."""
DEFAULT_LOG_DIR = "output/log"
DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_MAX_RESTARTS = 1
COLLECTIVES = ("auto", "shm", "gloo", "nccl")
DEVICES = ("auto", "cpu", "cuda", "npu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """What the command line says; None is not said."""

    config: Path | None = None
    checkpoint: Path | None = None
    workers: int | None = None
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: bool = False
    dtype: str | None = None
    device: str | None = None
    threads_per_rank: int | None = None
    collectives: str | None = None
    max_batch_size: int | None = None
    output: Path | None = None
    stats: Path | None = None
    log_dir: Path | None = None
    max_restarts: int | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose headers fit its config and the YAML."""

    source: CheckpointSource
    config: LlamaConfig
    scheme: Scheme


def predict(options: PredictOptions) -> None:
    """Run the main job. Raises InputError before anything starts, RanksFailedError when ranks failed."""
    environment = read_environment()
    settings = read_settings(options.config) if options.config else default_settings()
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    world_size = decide_world_size(options.workers, environment, settings.model_parallel)
    opened = open_model(find_checkpoint(options.checkpoint, settings), settings)
    opened.config.layout().check(world_size)
    tokenizer = read_tokenizer(Path(settings.vocab_file) if settings.vocab_file else _tokenizer_path(opened.source))
    prompts = read_prompts(options)
    job = plan_job(options, settings, opened, tokenizer, prompts, world_size)
    console = RunConsole(job, prompts, tokenizer)
    log_dir = Path(options.log_dir or settings.tandem.log_dir or DEFAULT_LOG_DIR)
    try:
        if environment.is_rank:
            _join(job, environment, console)
            restarts = 0
        else:
            max_restarts = _first(options.max_restarts, settings.tandem.max_restarts, DEFAULT_MAX_RESTARTS)
            restarts = spawn_ranks(job, log_dir, max_restarts, console.on_event, _tell_restart)
    except RanksFailedError as error:
        error.verdict.write(log_dir)
        raise
    finally:
        console.close()
    if not environment.rank:
        console.write(options.output, options.stats, restarts)


def find_checkpoint(option: Path | None, settings: Settings) -> Path:
    """The checkpoint of the command line, else the YAML's. Raises ConfigError when neither names one."""
    path = option or settings.load_checkpoint
    if not path:
        raise ConfigError("no checkpoint: give --checkpoint")
    return Path(path)


def open_model(path: Path, settings: Settings, *, quantized: bool = True) -> OpenedModel:
    """Open a checkpoint and hold it against its own config.json and the YAML. Raises InputError.

    `quantized`: whether the YAML's quantization_config describes this checkpoint, and not one still to be made.
    """
    source = open_checkpoint(path)
    config, scheme = build_config(source.config, str(source.path / "config.json")), read_scheme(source.config)
    settings.compare_model_config(config, str(path))
    wanted = settings.quantization if quantized else None
    if wanted is not None and wanted.combination != "A16W8":
        raise ConfigError(
            f"quantization_config asks for {wanted.quant_method} ({wanted.combination}), but only A16W8 can be run; use an rtn config"
        )
    if wanted is not None and scheme.name == "none":
        raise ConfigError(
            f"quantization_config asks for {wanted.quant_method} ({wanted.combination}), but {path} holds float weights; "
            f"make int8 ones with: tandem quantize -c {settings.source} --checkpoint {path} -a rtn-a16w8"
        )
    check_checkpoint(source, config, scheme)
    return OpenedModel(source, config, scheme)


def read_prompts(options: PredictOptions) -> list[str]:
    """The prompts of the options, of the file, or the original's three. Raises RequestError for a file without any."""
    prompts = list(options.prompts)
    path = options.prompts_file
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise RequestError(f"the prompts file {path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the prompts file {path} cannot be read: {error}") from None
        found = [_read_prompt(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise RequestError(f"the prompts file {path} holds no prompt: write one a line")
        prompts += found
    return prompts or list(DEFAULT_PROMPTS)


def plan_job(
    options: PredictOptions, settings: Settings, opened: OpenedModel, tokenizer: Tokenizer, prompts: list[str], world_size: int
) -> Job:
    """Fill in every decision. Options go over the YAML, the YAML over defaults. Raises InputError."""
    own, sampling, said_ids = settings.tandem, settings.sampling, settings.model_values
    context = min(opened.config.max_position_embeddings, settings.seq_length or opened.config.max_position_embeddings)
    prompt_ids = [tuple(tokenizer.encode(prompt)) for prompt in prompts]
    lengths = plan_lengths(options, settings, [len(ids) for ids in prompt_ids], context)
    requests = []
    for index, (ids, new_tokens) in enumerate(zip(prompt_ids, lengths, strict=True)):
        params = SamplingParams(
            max_new_tokens=new_tokens,
            do_sample=_first(options.do_sample, sampling.do_sample, False),
            temperature=_first(options.temperature, sampling.temperature, 1.0),
            top_k=_first(options.top_k, sampling.top_k, 50),
            top_p=_first(options.top_p, sampling.top_p, 1.0),
            repetition_penalty=_first(options.repetition_penalty, sampling.repetition_penalty, 1.0),
            seed=_first(options.seed, settings.seed, 0),
            ignore_eos=options.ignore_eos,
            logprobs=options.logprobs,
        )
        requests.append(Request(index, ids, params))
        check_request(requests[-1], context, opened.config.vocab_size)
    said = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p") if getattr(options, name) is not None}
    if said and not requests[0].params.do_sample:
        print(f"warning: {', '.join(said)} without --do-sample change nothing: the likeliest token is taken", file=sys.stderr)
    job = Job(
        checkpoint=str(opened.source.path.absolute()),
        world_size=world_size,
        context_tokens=context,
        # Ids that the YAML names go over the checkpoint's, as in MindFormers.
        eos_token_ids=(said_ids["eos_token_id"],) if "eos_token_id" in said_ids else opened.config.eos_token_ids,
        pad_token_id=said_ids.get("pad_token_id", opened.config.pad_token_id),
        dtype=_one_of("dtype", _first(options.dtype, own.dtype, settings.compute_dtype, opened.config.dtype), tuple(DTYPES)),
        device=_choose_device(_one_of("device", _first(options.device, own.device, "auto"), DEVICES)),
        collectives=_one_of("collectives", _first(options.collectives, own.collectives, "auto"), COLLECTIVES),
        threads_per_rank=_first(options.threads_per_rank, own.threads_per_rank),
        timeout_seconds=_first(options.timeout_seconds, own.timeout_seconds, DEFAULT_TIMEOUT_SECONDS),
        max_batch_size=_first(options.max_batch_size, own.max_batch_size),
        requests=tuple(requests),
    )
    _check_job(job)
    return job


def plan_lengths(options: PredictOptions, settings: Settings, lengths: list[int], context: int) -> list[int]:
    """New tokens of each prompt, from its length; cut, with a warning, where the context ends."""
    new_tokens = _first(options.max_new_tokens, None if options.max_length else settings.tandem.max_new_tokens)
    longest = max(lengths)
    if longest >= context:
        raise RequestError(f"prompt {lengths.index(longest)} has {longest} tokens, but the model's context is {context}: shorten it")
    if new_tokens is not None:
        if new_tokens < 1:
            raise RequestError(f"max_new_tokens is {new_tokens}, but has to be at least 1")
        if longest + new_tokens > context:
            print(f"warning: {longest} prompt tokens and {new_tokens} new ones exceed the context of {context}; cut there", file=sys.stderr)
        return [min(new_tokens, context - length) for length in lengths]
    max_length: int = _first(options.max_length, settings.sampling.max_length, min(DEFAULT_MAX_LENGTH, context))
    if max_length > context:
        print(f"warning: max_length {max_length} exceeds the context of {context}; cut there", file=sys.stderr)
        max_length = context
    if longest >= max_length:
        raise RequestError(
            f"prompt {lengths.index(longest)} has {longest} tokens, but max_length is {max_length}; set a larger --max-length"
        )
    return [max_length - length for length in lengths]


def _join(job: Job, environment: LaunchEnvironment, console: RunConsole) -> None:
    """Be one rank of a group that a launcher started."""
    rank, local_rank = environment.rank, environment.local_rank
    assert rank is not None and local_rank is not None
    store = join_store(environment, job.timeout_seconds)
    emit = console.on_event if rank == 0 else lambda event: None
    run_rank(job, rank, local_rank, environment.local_world_size or job.world_size, store, emit)


def _tell_restart(number: int) -> None:
    print(f"a rank failed; restart {number}: all ranks load again and what is not finished is decoded again", file=sys.stderr)


def _check_job(job: Job) -> None:
    for name in ("threads_per_rank", "max_batch_size", "timeout_seconds"):
        value = getattr(job, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}, but has to be above 0")
    if job.collectives == "shm" and (job.device != "cpu" or not shared_memory_works()):
        raise ConfigError("collectives shm need CPU ranks on an x86-64 Linux; use --collectives gloo")


def _choose_device(word: str) -> str:
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if word == "auto":
        return available.type if available is not None else "cpu"
    if word != "cpu" and (available is None or available.type != word):
        raise ConfigError(f"device {word} is not here: PyTorch sees {available.type if available else 'cpu'} only; use --device auto")
    return word


def _read_prompt(line: str, path: Path, number: int) -> str:
    if path.suffix != ".jsonl":
        return line
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise RequestError(f'{path}, line {number}: a JSON object with "prompt" is needed')
    return prompt


def _tokenizer_path(source: CheckpointSource) -> Path:
    return source.tokenizer_path() or source.path


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _one_of(name: str, value: str, words: tuple[str, ...]) -> str:
    if value not in words:
        raise ConfigError(f"{name} is {value!r}, but has to be one of {', '.join(words)}")
    return value
