"""One rank's part of `tandem bench`: runs the engine on random prompts and measures the time.

All ranks take the same steps; rank 0's clock counts. Speculation is measured with real prompts in `launcher/worker/speculation_bench.py`.
"""

import json
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from launcher.host.process_memory import read_peak_rss_bytes
from launcher.job.job import Job
from launcher.job.tasks import Bench
from launcher.worker.speculation_bench import measure_speculation
from model.checkpoint.first_layers import FirstLayers
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.random_source import RandomSource
from model.checkpoint.source import CheckpointSource
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine, step_all
from model.engine.request import Request, plan_blocks
from model.engine.sampling_params import SamplingParams
from model.engine.speculation import DEFAULT_DRAFT_TOKENS
from model.spec.config import DEFAULT_BLOCK_SIZE
from parallel.collectives import Collectives

SHORT_TOKENS = 16
"""Length of the prompts for decoding, short enough that the KV cache is small compared with the weights."""
_WARM_STEPS = 2
_GATHERS, _WARM_GATHERS = 200, 20


def open_source(job: Job, task: Bench) -> CheckpointSource:
    """Open the source of the weights."""
    source = RandomSource(json.loads(task.random_values), job.path) if task.random_values else open_checkpoint(job.path, job.opening)
    return FirstLayers(source, task.num_layers) if task.num_layers else source


class RankBench:
    """The measurements of one loaded model."""

    def __init__(
        self,
        task: Bench,
        model: LlamaForCausalLM,
        collectives: Collectives,
        measure_bandwidth: Callable[[], float],
        report: Callable[[int, int], None],
        draft_model: LlamaForCausalLM | None = None,
        draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    ) -> None:
        """`draft_model`: drafts up to `draft_tokens` in the measurement of speculation, in place of prompt lookup."""
        self._draft_model, self._draft_tokens = draft_model, draft_tokens
        self._task, self._model, self._collectives = task, model, collectives
        self._measure_bandwidth, self._report = measure_bandwidth, report
        self._random = random.Random(0)
        self._done, self._total = 0, 1 + task.rounds * (1 + len(task.batch_sizes) + 2 * len(task.speculated))
        self.peak_rss_bytes = 0
        """Includes the model and its run, but not the memory of the bandwidth measurement."""

    def measure(self) -> dict[str, Any]:
        """Measure prefill, decode at every batch size, memory bandwidth in between, one gather of a layer's output for one token, and
        speculation.

        Bandwidth is measured several times and the median reported, since it fluctuates on a shared machine.
        """
        sizes, world_size = self._task.batch_sizes, self._collectives.world_size
        first, *seconds = [self._time_prefill() for _ in range(self._task.rounds + 1)]
        until_token = median(took for took, _ in seconds)
        for size in sizes:
            self._time_steps(size, _WARM_STEPS)
        self.peak_rss_bytes = read_peak_rss_bytes()
        decode = [self._measure_decode(size) for size in sizes]
        config = self._model.config
        parts = [config.layout().hidden.interval(config.hidden_size, rank, world_size) for rank in range(world_size)]
        return {
            "memory_bandwidth_bytes_per_second": median(one["memory_bytes_per_second"] for one in decode),
            "start_to_first_token_seconds": first[1] - self._task.command_started,
            "time_to_first_token_seconds": until_token,
            "prefill_tokens_per_second": self._task.prompt_tokens / until_token,
            "decode": decode,
            "gather_seconds": self._time_gather([stop - start for start, stop in parts]),
            "speculation": self._measure_speculation(),
        }

    def start_prefill(self) -> Engine:
        """Create an engine that is about to run the prompt."""
        return self._start([self._request(0, self._task.prompt_tokens, 1)])

    def start_decode(self, batch_size: int, steps: int) -> Engine:
        """Create an engine that is about to decode a full batch for at least `steps` steps."""
        config, started = self._model.config, set[int]()
        prompt_tokens = max(1, min(SHORT_TOKENS, config.max_position_embeddings - steps - 1))
        # An engine may start sequences one by one: the first must last until the last has started.
        new_tokens = min(steps + batch_size, config.max_position_embeddings - prompt_tokens)
        engine = self._start([self._request(index, prompt_tokens, new_tokens) for index in range(batch_size)])
        while len(started) < batch_size:
            started.update(event.index for event in step_all(engine))
        return engine

    def _start(self, requests: list[Request]) -> Engine:
        """Create an engine with memory for these requests: on a device, a cache for whole contexts would not be free."""
        engine = Engine(self._model, len(requests), num_blocks=plan_blocks(requests, len(requests), DEFAULT_BLOCK_SIZE))
        for request in requests:
            engine.add(request)
        return engine

    def count_step_bytes(self) -> int:
        """Return the bytes of this rank's weights that a decode step reads: all except an embedding that is not the output head too."""
        model = self._model
        shared = model.lm_head is model.embed_tokens.rows
        embedding = 0 if shared else sum(tensor.nbytes for tensor in model.embed_tokens.parameters())
        return model.weight_bytes - embedding

    def _time_prefill(self) -> tuple[float, float]:
        """Return the seconds from a prompt to its first token, and time.monotonic() at that token."""
        engine = self.start_prefill()
        self._collectives.barrier()
        started = time.monotonic()
        while not step_all(engine):
            pass
        ended = time.monotonic()
        self._get_on()
        return ended - started, ended

    def _measure_decode(self, batch_size: int) -> dict[str, Any]:
        speeds, bandwidths = [], [self._measure_bandwidth()]
        for _ in range(self._task.rounds):
            speeds.append(1 / self._time_steps(batch_size, self._task.new_tokens))
            bandwidths.append(self._measure_bandwidth())
            self._get_on()
        return {
            "batch_size": batch_size,
            "memory_bytes_per_second": median(bandwidths),
            "tokens_per_second": median(speeds),
            "tokens_per_second_min": min(speeds),
            "tokens_per_second_max": max(speeds),
        }

    def _time_steps(self, batch_size: int, steps: int) -> float:
        """Return the median seconds per token over steps that yield one token for every sequence."""
        steps = min(steps, self._task.new_tokens)
        engine, seconds = self.start_decode(batch_size, steps), list[float]()
        self._collectives.barrier()
        while len(seconds) < steps and engine.has_unfinished:
            started = time.perf_counter()
            events = step_all(engine)
            took = time.perf_counter() - started
            if len(events) >= batch_size:
                seconds.append(took / len(events))
        return median(seconds)

    def _measure_speculation(self) -> list[dict[str, Any]] | None:
        """Return the rows of the speculation result; None if it was not requested or the engine does not speculate."""
        task = self._task
        if not task.speculated:
            return None
        options = (
            {"speculate": True} if self._draft_model is None else {"draft_model": self._draft_model, "draft_tokens": self._draft_tokens}
        )
        return measure_speculation(self._model, self._collectives, task.speculated, task.rounds, self._get_on, options)

    @torch.inference_mode()
    def _time_gather(self, sizes: list[int]) -> float:
        local = torch.zeros((1, sizes[self._collectives.rank]), dtype=self._model.dtype, device=self._model.device)
        seconds = []
        for _ in range(_WARM_GATHERS + _GATHERS):
            started = time.perf_counter()
            self._collectives.gather_columns(local, sizes)
            seconds.append(time.perf_counter() - started)
        return median(seconds[_WARM_GATHERS:])

    def _request(self, index: int, prompt_tokens: int, new_tokens: int) -> Request:
        ids = tuple(self._random.randrange(self._model.config.vocab_size) for _ in range(prompt_tokens))
        return Request(index, ids, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))

    def _get_on(self) -> None:
        self._done += 1
        self._report(min(self._done, self._total), self._total)
