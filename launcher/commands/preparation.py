"""Validation of every command's options before PyTorch is imported: paths, model, YAML, rank count, prompts, port.

This reports input errors within a fraction of a second. Checks that depend on file contents follow in each command's module.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.commands.early_checks import check_model
from launcher.commands.refusal import refusal
from launcher.environment.detection import LaunchEnvironment, decide_world_size, read_environment
from launcher.host.cores import count_cores
from launcher.host.streams import require_stdout
from launcher.rendezvous.nodes import Nodes, plan_nodes
from launcher.server.listening import listen, read_keys
from launcher.settings.api_batch import read_batch
from launcher.settings.approaches import check_words, resolve_approach
from launcher.settings.checkpoint_options import PlanOptions, QuantizeOptions, VerifyOptions
from launcher.settings.decode_options import ApiOptions, BatchOptions, ChatOptions, PredictOptions, ServeOptions
from launcher.settings.lora_options import check_adapters, choose_adapter
from launcher.settings.measure_options import BenchOptions, EnvOptions, EvaluateOptions
from launcher.settings.model_location import find_model
from launcher.settings.msrun_options import MsrunOptions, check_msrun_options
from launcher.settings.options import CheckpointOptions, EngineOptions, RunOptions
from launcher.settings.program_options import ProgramOptions
from launcher.settings.prompts import read_prompts
from launcher.settings.yaml_file import find_yaml
from launcher.settings.yaml_settings import Settings, open_settings
from parallel.errors import ConfigError

SERVE_EXTRA = "pip install 'tandem-launcher[serve]'"
_MAX_THREADS_PER_CORE = 4


def prepare(options: Any) -> Any:
    """Return the options with MODEL resolved to a path, the YAML in its folder, and the prompts read. Raises InputError."""
    _check_stdout(options)
    if isinstance(options, ProgramOptions):
        _note_msrun_options(options)
        if options.bind_cores not in (None, "False"):
            print("note: --bind_core is not used: the ranks of a program share the cores", file=sys.stderr)
        _check_program(options)
    if not isinstance(options, CheckpointOptions):
        return options
    environment = read_run_environment(options) if isinstance(options, RunOptions) else None
    if environment is not None and environment.is_scheduler:
        return options  # this process only serves the rendezvous
    if environment is not None:
        refusal.expect_others(environment)
    if isinstance(options, QuantizeOptions):
        options = resolve_approach(options)
        check_words(options)
    if isinstance(options, RunOptions):
        _note_msrun_options(options)
    _check_input_files(options)
    if isinstance(options, EngineOptions | PlanOptions):
        check_adapters(options.lora)
    options = _locate_draft_model(locate_model(options))
    settings = open_settings(options.config)
    if options.checkpoint is None and _needs_checkpoint(options):
        if not settings.load_checkpoint:
            command = _COMMANDS.get(type(options), "predict")
            other = ", or --model-config with --random-weights" if isinstance(options, BenchOptions) else ""
            raise ConfigError(f"no model: give --checkpoint, a path or a Hugging Face id, as in tandem {command} MODEL{other}")
        path, model_id = find_model(settings.load_checkpoint, offline=options.offline)
        options = replace(options, checkpoint=path, model_id=model_id)
    if isinstance(options, RunOptions) and environment is not None:
        _check_ranks(options, environment, settings)
    for kind, check in _CHECKS.items():
        if isinstance(options, kind):
            options = check(options, environment)
    return options


def locate_model(options: Any) -> Any:
    """Resolve MODEL, --checkpoint or --model to a path, and use the MindFormers YAML in its folder unless --config is given."""
    model, checkpoint = options.model, options.checkpoint
    if model is not None and checkpoint is not None and str(model) != str(checkpoint):
        raise ConfigError(f"two models are given, {model} and {checkpoint}: give one")
    text = model if model is not None else checkpoint
    if text is None:
        return options
    if not str(text).strip():
        raise ConfigError("the model is an empty text: give a path or a Hugging Face id")
    path, model_id = find_model(str(text), offline=options.offline)
    config = options.config
    if config is None:
        config = find_yaml(path)
        if config is not None:
            print(f"config: {config}", file=sys.stderr)
    return replace(options, model=None, checkpoint=path, config=config, model_id=model_id)


def _locate_draft_model(options: Any) -> Any:
    """Resolve --draft-model to a path. Raises ConfigError for options that exclude each other."""
    draft_model = getattr(options, "draft_model", None)
    if draft_model is None:
        if getattr(options, "draft_tokens", None) is not None:
            raise ConfigError(f"--draft-tokens is {options.draft_tokens}, but there is no draft model: give --draft-model, or drop it")
        return options
    if getattr(options, "speculate", None):
        raise ConfigError("--speculate and --draft-model both draft tokens: give one of them")
    if not str(draft_model).strip():
        raise ConfigError("--draft-model is an empty text: give a path or a Hugging Face id")
    return replace(options, draft_model=find_model(str(draft_model), offline=options.offline)[0])


def read_run_environment(options: RunOptions) -> LaunchEnvironment:
    """Return the launch environment as this command line uses it."""
    environment = read_environment()
    if options.num_nodes or options.local_workers:
        # With these options srun or mpirun starts one command per node, which is not a rank.
        return environment.as_program()
    return environment


def writes_results(options: RunOptions) -> bool:
    """Whether this process is the one of its run that writes results: on the first node, or as rank 0. Paths may not exist elsewhere."""
    if options.num_nodes or options.local_workers:
        return not options.node_rank
    return not read_environment().rank


def plan_run_nodes(options: RunOptions, world_size: int) -> Nodes:
    """Plan the nodes of this run and the ranks that this one starts."""
    return plan_nodes(
        world_size,
        num_nodes=options.num_nodes,
        node_rank=options.node_rank,
        local_workers=options.local_workers,
        master_addr=options.master_addr,
        master_port=options.master_port,
    )


def _check_program(options: ProgramOptions) -> None:
    environment = read_environment()
    if environment.is_rank or environment.is_scheduler:
        raise ConfigError(
            f"tandem run starts ranks, but {environment.launcher} started this process as one of several: run the program directly"
        )
    world_size = decide_world_size(options.workers, environment, None)
    if options.local_workers not in (None, world_size) or options.node_rank not in (None, -1, 0):
        raise ConfigError(
            f"--local_worker_num and --node_rank ask for ranks on several hosts, but tandem run starts all {world_size} on this one: "
            "use msrun or torchrun there"
        )
    if options.module is not None:
        # As with python -m, the current directory comes first.
        if not options.module or PathFinder.find_spec(options.module.partition(".")[0], [os.getcwd(), *sys.path]) is None:
            raise ConfigError(f"there is no module {options.module!r} in {os.getcwd()} or among the installed packages")
        return
    if not options.words:
        raise ConfigError("no program: give a Python file, as in tandem run script.py --workers 2, or -m MODULE")
    path = Path(options.words[0])
    if path.is_dir():
        raise ConfigError(f"the program {path} is a folder, but a Python file is needed")
    if not path.is_file():
        raise ConfigError(f"the program {path} does not exist")


def _needs_checkpoint(options: CheckpointOptions) -> bool:
    return not isinstance(options, PlanOptions) and not (isinstance(options, BenchOptions) and options.random_weights)


def _check_stdout(options: Any) -> None:
    remedy = next((words for kind, words in _PRINTS_RESULTS.items() if isinstance(options, kind)), None)
    if remedy is None or (isinstance(options, PredictOptions) and options.output is not None):
        return
    if not isinstance(options, RunOptions) or writes_results(options):
        require_stdout(remedy)


def _note_msrun_options(options: MsrunOptions) -> None:
    for note in check_msrun_options(options):
        print(f"note: {note}", file=sys.stderr)


def _check_input_files(options: CheckpointOptions) -> None:
    for name, flag in _INPUT_FILES.items():
        path: Path | None = getattr(options, name, None)
        if path is None:
            continue
        if not path.exists():
            raise ConfigError(f"{flag} {path} does not exist")
        if path.is_dir():
            raise ConfigError(f"{flag} {path} is a folder, but a file is needed")


def _check_ranks(options: RunOptions, environment: LaunchEnvironment, settings: Settings) -> None:
    world_size = decide_world_size(options.workers, environment, settings.model_parallel)
    if not environment.is_rank:
        plan_run_nodes(options, world_size)
    threads, cores = options.threads_per_rank, count_cores()
    if threads is not None and threads > _MAX_THREADS_PER_CORE * cores:
        raise ConfigError(f"--threads-per-rank is {threads}, but this process may use {cores} cores: give at most that")
    check_model(options, settings, world_size)


def _prepare_predict(options: PredictOptions, environment: LaunchEnvironment) -> PredictOptions:
    # Ranks started by a launcher would each read part of the same standard input.
    prompts = read_prompts(options.prompts, options.prompts_file, may_read_input=not environment.is_rank)
    adapter = choose_adapter(options.lora, options.adapter)
    return replace(options, prompts=prompts, prompts_file=None, adapter=adapter)


def _prepare_chat(options: ChatOptions, environment: LaunchEnvironment) -> ChatOptions:
    if environment.is_rank:
        raise ConfigError(f"tandem chat needs a single process, but {environment.launcher} started this one as a rank")
    return replace(options, adapter=choose_adapter(options.lora, options.adapter))


def _prepare_api(options: ApiOptions, environment: LaunchEnvironment) -> ApiOptions:
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(module) is None:
            raise ConfigError(f"tandem {_COMMANDS[type(options)]} needs {module}, which is not installed: {SERVE_EXTRA}")
    return options


def _prepare_batch(options: BatchOptions, environment: LaunchEnvironment) -> BatchOptions:
    if options.input is None:
        raise ConfigError("no input: give a file of requests, as in tandem batch INPUT.jsonl MODEL --output OUTPUT.jsonl")
    if options.output is None:
        raise ConfigError("--output is missing: give a file for the answers")
    if not writes_results(options):
        return options
    if options.output.exists() and options.output.samefile(options.input):
        raise ConfigError(f"--output {options.output} is the input file: give another one")
    read_batch(options.input)
    return options


def _prepare_serve(options: ServeOptions, environment: LaunchEnvironment) -> ServeOptions:
    read_keys(options.host, options.api_key_file, insecure=options.insecure)
    if not environment.rank and not options.node_rank:
        listen(options.host, options.port).close()
    return options


def _prepare_eval(options: EvaluateOptions, environment: LaunchEnvironment) -> EvaluateOptions:
    if options.task is None:
        raise ConfigError("--task is missing: give boolq or perplexity")
    if options.data is None:
        raise ConfigError("--data is missing: give a BoolQ file (JSON lines) or a text file")
    return options


_INPUT_FILES = {
    "key_file": "--key-file",
    "vocab_file": "--vocab_file",
    "model_config": "--model-config",
    "api_key_file": "--api-key-file",
    "dataset_path": "--dataset-path",
    "data": "--data",
    "input": "INPUT",
}
"""Options that name an input file, by field."""
_PRINTS_RESULTS = {
    PredictOptions: "give --output",
    **dict.fromkeys((BenchOptions, EvaluateOptions, PlanOptions, VerifyOptions, EnvOptions), "leave it open"),
}
"""What to do about a closed standard output, for commands whose results would be lost."""
_COMMANDS = {
    BatchOptions: "batch",
    ChatOptions: "chat",
    ServeOptions: "serve",
    BenchOptions: "bench",
    EvaluateOptions: "eval",
    QuantizeOptions: "quantize",
}
_CHECKS: dict[type, Callable[[Any, Any], Any]] = {
    PredictOptions: _prepare_predict,
    ChatOptions: _prepare_chat,
    ApiOptions: _prepare_api,
    BatchOptions: _prepare_batch,
    ServeOptions: _prepare_serve,
    EvaluateOptions: _prepare_eval,
}
