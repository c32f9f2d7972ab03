"""Diagnosis of NaN or infinite logits: where they come from, and what to do.

The usual cause is a float16 overflow: its maximum is 65504, which models trained in bfloat16 exceed.
"""

from collections.abc import Sequence

import torch

from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.spec.config import PREFILL_TOKENS

_ADVICE = {
    torch.float16: "use --dtype bfloat16 or float32",
    torch.bfloat16: "use --dtype float32, or check the weights with tandem verify",
    torch.float32: "check the weights with tandem verify",
}


def explain(dtype: torch.dtype, where: str, layer: str | None = None) -> str:
    """Describe the failure in one sentence. `where`: where it was detected; `layer`: see `find_first_layer`."""
    first = f", first behind {layer}" if layer else ""
    return f"the logits are NaN or infinite in {str(dtype).removeprefix('torch.')} {where}{first}: {_ADVICE[dtype]}"


def find_first_layer(model: LlamaForCausalLM, ids: Sequence[int], adapter: int = 0) -> str | None:
    """Describe the first part of the model with a non-finite hidden state; None if there are more ids than fit a pass.

    Runs the whole sequence again, layer by layer. Every rank has to call this with the same ids. `adapter`: see Span.
    """
    if len(ids) > PREFILL_TOKENS:
        return None
    cache, hidden = model.build_cache(len(ids)), model.embed(ids)
    if not hidden.isfinite().all():
        return "the embedding"
    for index in range(len(model.layers)):
        hidden = model.run_layer(index, hidden, [Span(cache, list(ids), adapter)])
        if not hidden.isfinite().all():
            return f"layer {index} of {len(model.layers)}"
    return "the last norm or the head"
