"""`tandem predict`: resolves options, YAML, environment and headers into a job, then runs it.

All input errors are raised here, before any process starts. Does not depend on typer: options come as a dataclass.
"""

import sys
from contextlib import ExitStack
from dataclasses import replace

from launcher.commands.job_plan import build_job
from launcher.commands.opened_run import Run, open_run
from launcher.commands.preparation import writes_results
from launcher.commands.run_ranks import run_job
from launcher.host.file_errors import as_run_failure
from launcher.host.output_paths import check_output_file
from launcher.reporting.console import RunConsole
from launcher.reporting.printed_results import build_printer
from launcher.reporting.results import ResultsFile, hold_results, read_results
from launcher.settings.decode_options import PredictOptions
from launcher.settings.options import SamplingOptions
from launcher.settings.precedence import first_not_none
from launcher.settings.yaml_settings import Settings
from model.engine.request import Request, check_memory, check_request
from model.engine.sampling_params import SamplingParams
from model.text.tokenizer import Tokenizer
from parallel.errors import RequestError, RunError

DEFAULT_MAX_LENGTH = 1024
"""Default of MindFormers' LlamaConfig.max_decode_length."""


def predict(options: PredictOptions) -> None:
    """Run the command. Raises InputError before anything starts, RanksFailedError if ranks fail."""
    if writes_results(options):
        check_output_file("--output", options.output)
        check_output_file("--stats", options.stats)
        check_output_file("--save_file", options.save_file)
    run = open_run(options)
    tokenizer = run.read_tokenizer()
    prompts = list(options.prompts)
    requests = plan_requests(options, run, tokenizer, prompts)
    if options.resume and options.output is None:
        raise RequestError("--resume skips prompts already in the --output file; give --output")
    # A rank restarted by a launcher resumes where the previous attempt stopped.
    again = run.environment.restart_count > 0 and options.output is not None
    resume = options.resume or again
    vocab_size = run.opened.config.vocab_size
    with ExitStack() as stack:
        if options.output is not None and not run.environment.rank and not run.nodes.node_rank:
            stack.enter_context(hold_results(options.output))
        done = read_results(options.output, requests, prompts, vocab_size) if options.output is not None and resume else []
        output = ResultsFile(options.output, done, resume=resume) if options.output is not None else None
        # Do not stream from a launcher's rank: after a restart it would repeat the beginning of a text.
        printer = build_printer(options.output_format, len(prompts), streams=not run.environment.is_rank)
        console = RunConsole(run.world_size, requests, prompts, tokenizer, output, done, printer)
        _decode(options, run, console, output, tokenizer, again=again)


def _decode(
    options: PredictOptions, run: Run, console: RunConsole, output: ResultsFile | None, tokenizer: Tokenizer, *, again: bool
) -> None:
    """Run the ranks and write their results. `again` is set if a launcher has restarted this rank."""
    task = console.plan_task()
    job = build_job(run, task, tokenizer=tokenizer)
    if job.block_limit is not None:
        for request in task.requests:
            check_memory(request, job.block_limit, job.block_size)
    if output is not None and run.environment.is_rank and run.environment.rank == 0:
        output.begin()  # before the ranks start, since a launcher may restart this rank
    restarts = 0
    try:
        if not run.environment.rank and not run.nodes.node_rank:
            console.print_done(again=not again)
        if console.is_done and run.nodes.num_nodes == 1 and not run.environment.is_rank:
            print(f"nothing to do: all {len(task.requests)} prompts are in {options.output}", file=sys.stderr)
        else:
            restarts = run_job(run, job, console)
    finally:
        console.close()
    if run.environment.rank or run.nodes.node_rank:
        return  # rank 0 and its parent have the results
    if not console.is_done:
        raise RunError("every rank exited with 0, but some prompts are unfinished; this is a bug in tandem, see the logs of the ranks")
    with as_run_failure():
        console.write(options.stats, restarts)
        if options.save_file is not None:
            console.save(options.save_file)
    if console.failure:
        raise RunError(console.failure)


def plan_requests(options: PredictOptions, run: Run, tokenizer: Tokenizer, prompts: list[str]) -> list[Request]:
    """Build the requests from tokenized prompts. Options override the YAML, which overrides defaults. Raises InputError."""
    settings, context = run.settings, run.context_tokens
    prompt_ids = [tuple(tokenizer.encode(prompt)) for prompt in prompts]
    lengths = plan_lengths(options, settings, [len(ids) for ids in prompt_ids], context)
    requests = []
    for index, (ids, new_tokens) in enumerate(zip(prompt_ids, lengths, strict=True)):
        params = replace(plan_params(options, settings, new_tokens), ignore_eos=options.ignore_eos, logprobs=options.logprobs)
        requests.append(Request(index, ids, params, adapter=options.adapter))
        check_request(requests[-1], context, run.opened.config.vocab_size)
    said = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p") if getattr(options, name) is not None}
    if said and not requests[0].params.do_sample:
        print(f"warning: {', '.join(said)} without --do-sample change nothing: decoding is greedy", file=sys.stderr)
    return requests


def plan_params(options: SamplingOptions, settings: Settings, max_new_tokens: int) -> SamplingParams:
    """Build sampling parameters: options override the YAML, which overrides defaults. Raises RequestError for values out of range."""
    sampling = settings.sampling
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        do_sample=first_not_none(options.do_sample, sampling.do_sample, False),
        temperature=first_not_none(options.temperature, sampling.temperature, 1.0),
        top_k=first_not_none(options.top_k, sampling.top_k, 50),
        top_p=first_not_none(options.top_p, sampling.top_p, 1.0),
        repetition_penalty=first_not_none(options.repetition_penalty, sampling.repetition_penalty, 1.0),
        seed=first_not_none(options.seed, settings.seed, 0),
    )


def plan_lengths(options: PredictOptions, settings: Settings, lengths: list[int], context: int) -> list[int]:
    """Return the maximum new tokens of each prompt from its length, truncated to the context with a warning."""
    new_tokens = first_not_none(options.max_new_tokens, None if options.max_length else settings.tandem.max_new_tokens)
    longest = max(lengths)
    if longest >= context:
        raise RequestError(f"prompt {lengths.index(longest)} has {longest} tokens, but the model's context is {context}: shorten it")
    if new_tokens is not None:
        if new_tokens < 1:
            raise RequestError(f"max_new_tokens is {new_tokens}, but has to be at least 1")
        if longest + new_tokens > context:
            print(f"warning: {longest} prompt tokens and {new_tokens} new ones exceed the context of {context}; cut there", file=sys.stderr)
        return [min(new_tokens, context - length) for length in lengths]
    max_length: int = first_not_none(options.max_length, settings.sampling.max_length, min(DEFAULT_MAX_LENGTH, context))
    if max_length > context:
        print(f"warning: max_length {max_length} exceeds the context of {context}; cut there", file=sys.stderr)
        max_length = context
    if longest >= max_length:
        raise RequestError(
            f"prompt {lengths.index(longest)} has {longest} tokens, but max_length is {max_length}; set a larger --max-length"
        )
    return [max_length - length for length in lengths]
