"""One level of load on a server: so many clients, what they sent and what they saw."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from completion_client import OK, Answer, build_prompt, build_request, complete
from http_client import Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What so many clients saw. Seconds are None when no request came to its end."""

    clients: int
    requests: int
    failures: dict[str, int]
    """By status, or by words where there was none."""
    refused: int
    """Attempts that were answered with 429."""
    seconds: float
    tokens: int
    prompt_tokens: float | None
    """Of a request, as the server counts, on average."""
    tokens_per_second: float
    requests_per_second: float
    first_token_seconds: float | None
    first_token_seconds_95: float | None
    between_tokens_seconds: float | None
    between_tokens_seconds_95: float | None
    between_tokens_seconds_99: float | None
    between_tokens_seconds_worst: float | None
    client_cpu_share: float
    """Of one core, used by this program."""


@dataclass(frozen=True, slots=True)
class Sender:
    """How requests are made."""

    address: Address
    model: str
    tokens_per_word: float
    timeout_seconds: float

    async def send(self, seed: str, prompt_tokens: int, max_tokens: int) -> Answer:
        """One request with a prompt of its own."""
        prompt = build_prompt(seed, round(prompt_tokens / self.tokens_per_word))
        return await complete(self.address, build_request(self.model, prompt, max_tokens), timeout_seconds=self.timeout_seconds)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of all are not above."""
    return sorted(values)[max(0, -int(-len(values) * share // 1) - 1)]


def summarize(clients: int, answers: Sequence[Answer], seconds: float, cpu_seconds: float = 0.0) -> Level:
    """Figures of all requests of some clients."""
    done = [answer for answer in answers if answer.outcome == OK and answer.times]
    first = [answer.times[0] - answer.started for answer in done]
    between = [later - earlier for answer in done for earlier, later in zip(answer.times, answer.times[1:], strict=False)]
    failed = ["nothing came" if answer.outcome == OK else answer.outcome for answer in answers if answer.outcome != OK or not answer.times]
    prompts = [answer.prompt_tokens for answer in done if answer.prompt_tokens is not None]
    tokens = sum(answer.num_tokens for answer in done)
    return Level(
        clients=clients,
        requests=len(answers),
        failures=dict(Counter(failed)),
        refused=sum(len(answer.refusals) for answer in answers),
        seconds=seconds,
        tokens=tokens,
        prompt_tokens=statistics.fmean(prompts) if prompts else None,
        tokens_per_second=tokens / seconds,
        requests_per_second=len(done) / seconds,
        first_token_seconds=statistics.median(first) if first else None,
        first_token_seconds_95=percentile(first, 0.95) if first else None,
        between_tokens_seconds=statistics.median(between) if between else None,
        between_tokens_seconds_95=percentile(between, 0.95) if between else None,
        between_tokens_seconds_99=percentile(between, 0.99) if between else None,
        between_tokens_seconds_worst=max(between) if between else None,
        client_cpu_share=cpu_seconds / seconds,
    )


async def measure_level(
    sender: Sender, clients: int, requests_per_client: int, prompt_tokens: int, max_tokens: int, label: str = ""
) -> Level:
    """So many clients at once. Prompts of another `label` are other ones."""

    async def run_client(client: int) -> list[Answer]:
        seeds = [f"{label}{clients} {client} {index}" for index in range(requests_per_client)]
        return [await sender.send(seed, prompt_tokens, max_tokens) for seed in seeds]

    began, began_cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(run_client(client) for client in range(clients)))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return summarize(clients, [answer for some in answers for answer in some], seconds, cpu_seconds)
