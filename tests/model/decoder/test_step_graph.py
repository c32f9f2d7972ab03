"""Recorded steps: with a recording that runs the step again, tokens, caches and bits are those of steps that are not recorded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.backends.interface import Backend
from model.decoder import llama
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine, generate
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams

PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 35, 8, 9, 7, 9])


class HostBlock:
    """Inputs without a device: what is sent arrives at once."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.values, self.on_device = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)

    def wait(self) -> None:
        pass

    def send(self) -> None:
        self.on_device.copy_(self.values)


class Recorder:
    """Runs a recorded step again, into the result of the first run, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def open_block(self, size: int, device: torch.device) -> HostBlock:
        return HostBlock(size, device)

    def capture(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        result = step()
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            return result.copy_(step())

        return replay


@pytest.fixture
def recorder(triton_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(llama, "find_backend", lambda device_type: triton_backend)
    return Recorder()


def run(model: LlamaForCausalLM) -> dict[int, list[int]]:
    engine, tokens = Engine(model, 3, num_blocks=8), {index: list[int]() for index in range(len(PROMPTS))}
    # Sequences that end one after the other: steps of three, two and one rows.
    requests = [
        Request(index, tuple(prompt), SamplingParams(max_new_tokens=2 + index, do_sample=False, ignore_eos=True))
        for index, prompt in enumerate(PROMPTS)
    ]
    for event in generate(engine, requests):
        tokens[event.index].append(event.token_id)
    return tokens


def test_recorded_steps_give_the_tokens_of_others(
    recorder: Recorder,
    triton_backend: Backend,
    tiny_llama: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(build_model(tiny_llama("llama3_rope")))
    assert recorder.recorded == 0 and [len(tokens) for tokens in expected.values()] == [2, 3, 4]
    monkeypatch.setattr(triton_backend, "recorder", recorder)
    assert run(build_model(tiny_llama("llama3_rope"))) == expected
    # Prompts of at most eight tokens are recorded too: 14 rows of 16, and then one graph for each of 4, 2 and 1 rows.
    assert (recorder.recorded, recorder.replayed) == (4, 4)
