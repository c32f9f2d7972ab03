"""The scheme that a run uses: a checkpoint's, with the KV cache, the activations and the output head that were asked for."""

from dataclasses import replace

from model.spec.linear_scheme import LinearGroup, LinearScheme
from model.spec.scheme import Scheme
from parallel.errors import ConfigError

PRECISIONS = ("auto", "int8")
"""Values of --activations and --lm-head; auto: as the checkpoint says."""
INT8_HEAD = LinearScheme(packed=False)
"""An output head that is quantized while it is loaded: symmetric, with one scale per row."""


def plan_run_scheme(stored: Scheme, *, tied: bool, kv_cache: str | None, activations: str, lm_head: str) -> Scheme:
    """Return the scheme of a run. `tied`: the output head is the embedding; `kv_cache`: see Scheme; the rest: see PRECISIONS.

    The inputs of the output head are never rounded to 8 bits on request: they decide the token directly. Raises ConfigError
    where int8 activations, or an int8 output head, do not apply to what the checkpoint stores.
    """
    scheme, head = replace(stored, kv_cache=kv_cache), None if tied else stored.find_linear("lm_head")
    if activations == "int8":
        _check_activations(stored)
        assert stored.linear is not None
        others = tuple(LinearGroup(group.targets, replace(group.linear, activation="token")) for group in stored.others)
        if head is not None and head.activation is None:
            others = (*others, LinearGroup(("lm_head",), head))
        scheme = replace(scheme, linear=replace(stored.linear, activation="token"), others=others)
    if lm_head == "int8":
        if head is not None and (head.float8 or head.bits != 8):
            raise ConfigError(f"--lm-head is int8, but the checkpoint stores its output head as {head.name}: drop --lm-head")
        if head is None:
            scheme = replace(scheme, head=INT8_HEAD)
    return scheme


def _check_activations(stored: Scheme) -> None:
    if not stored.groups:
        raise ConfigError(
            "--activations is int8, but the checkpoint holds float weights, whose inputs stay in the compute type: quantize it first, "
            "as with tandem quantize -a rtn-a16w8, or drop --activations"
        )
    for group in stored.groups:
        if group.linear.float8:
            raise ConfigError(
                f"--activations is int8, but the checkpoint holds FP8 weights ({group.linear.name}), whose inputs stay in the compute "
                "type: drop --activations"
            )
        if group.linear.activation == "tensor":
            raise ConfigError(
                f"--activations is int8, a scale per token, but the checkpoint quantizes its activations with stored scales "
                f"({group.linear.name}): drop --activations"
            )
