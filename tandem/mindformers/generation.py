"""Arguments of MindFormers' `generate`: defaults from the YAML, and what is refused."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.commands.predict import DEFAULT_MAX_LENGTH
from launcher.settings.yaml_settings import Settings
from model.engine.request import Request, check_request
from model.engine.sampling_params import SamplingParams
from model.spec.config import LlamaConfig
from parallel.errors import RequestError
from tandem.auto_model import strip_padding
from tandem.mindformers.log import logger
from tandem.mindformers.streamers import Streamer

Rows = list[npt.NDArray[np.int32]]

_SUPPORTED = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "return_dict_in_generate",
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1.0,),
    "renormalize_logits": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "parallel_decoding": (False,),
}
"""Options that are not supported, with the values that have no effect."""
_WITHOUT_EFFECT = ("use_past", "use_cache", "bos_token_id", "window_size", "level", "guess_set_size")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of `generate` with all its values."""

    requests: list[Request]
    returns_dict: bool

    def describe(self) -> list[Any]:
        """Return what has to be equal on all ranks."""
        return [asdict(request) for request in self.requests]


def plan_call(
    input_ids: Any, options: Mapping[str, Any], streamer: Streamer | None, seed: int | None, settings: Settings, config: LlamaConfig
) -> Call:
    """Build the requests. Raises RequestError for unknown and unsupported options, and for prompts that do not fit."""
    said = {name: value for name, value in options.items() if value is not None}
    _refuse_unsupported(said)
    pad = said.get("pad_token_id", config.pad_token_id)
    prompts = strip_padding(np.asarray(input_ids) if hasattr(input_ids, "asnumpy") else input_ids, pad)
    if streamer is not None and len(prompts) > 1:
        raise RequestError(f"generate got a streamer and {len(prompts)} rows, but a streamer takes one sequence: give one row")
    sampling, longest = settings.sampling, max(map(len, prompts))
    limit = _plan_length(said, settings, longest, config.max_position_embeddings)
    least = max(said.get("min_length", 0) - min(map(len, prompts)), said.get("min_new_tokens", 0))
    if least > 0:
        raise RequestError(f"generate asks for {least} new tokens at least, but a minimum is not supported: leave out min_length")
    ends = said.get("eos_token_id")
    params: dict[str, Any] = {
        "do_sample": bool(said.get("do_sample", sampling.do_sample or False)),
        "temperature": float(_number(said, "temperature", sampling.temperature, 1.0)),
        "top_k": int(_number(said, "top_k", sampling.top_k, 50)),
        "top_p": float(_number(said, "top_p", sampling.top_p, 1.0)),
        "repetition_penalty": float(_number(said, "repetition_penalty", sampling.repetition_penalty, 1.0)),
        "seed": int(seed if seed is not None else settings.seed or 0),
        "ignore_eos": ends is not None,
        "stop_token_ids": () if ends is None else tuple(int(end) for end in np.atleast_1d(ends)),
    }
    requests = [
        Request(index, prompt, SamplingParams(max_new_tokens=limit - len(prompt), **params)) for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        check_request(request, config.max_position_embeddings, config.vocab_size)
    return Call(requests, bool(said.get("return_dict_in_generate", False)))


def _refuse_unsupported(said: Mapping[str, Any]) -> None:
    known = (*_SUPPORTED, *_NEUTRAL, *_WITHOUT_EFFECT)
    for name, value in said.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise RequestError(f"generate has no option {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            what = "beam search is" if name == "num_beams" else f"{name} is"
            raise RequestError(f"{name} is {value!r}, but {what} not supported: set it to {_NEUTRAL[name][0]} or leave it out")


def _plan_length(said: Mapping[str, Any], settings: Settings, longest: int, context: int) -> int:
    """Return the maximum length of a row, prompt included."""
    if "max_new_tokens" in said:
        new_tokens = int(_number(said, "max_new_tokens"))
        if new_tokens < 1:
            raise RequestError(f"max_new_tokens is {new_tokens}, but has to be at least 1")
        limit = longest + new_tokens
    else:
        limit = int(_number(said, "max_length", settings.sampling.max_length, min(DEFAULT_MAX_LENGTH, context)))
    if limit > context:
        logger.warning("max_length %d exceeds the context of %d; cut there", limit, context)
        limit = context
    if limit <= longest:
        raise RequestError(f"max_length is {limit}, but the longest prompt has {longest} tokens; set a larger max_length")
    return limit


def _number(said: Mapping[str, Any], name: str, *defaults: float | None) -> float:
    """Return an option, otherwise the first default that is set. Raises RequestError for what is no number."""
    value = next(value for value in (said.get(name), *defaults) if value is not None)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}, but a number is needed")
    return float(value) if isinstance(value, np.floating) else value  # type: ignore[return-value]
