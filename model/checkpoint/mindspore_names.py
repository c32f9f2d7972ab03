"""Canonical names for the tensor names that MindFormers and Golden Stick 0.6 use for a Llama.

Names of linears without their role are in `MINDFORMERS_NAMES` of `model/spec/weights.py`.
"""

import re
from collections.abc import Mapping

from model.spec.linear_scheme import LinearScheme
from model.spec.weights import MINDFORMERS_NAMES

PLAIN_NAMES: Mapping[str, str] = {
    "tok_embeddings.embedding_weight": "embed_tokens.weight",
    "norm_out.weight": "norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.infer_attention.paged_attention_mgr.key_t_scale": "self_attn.k_scale",
    "attention.infer_attention.paged_attention_mgr.value_t_scale": "self_attn.v_scale",
}
"""Tensors outside of linears, by the name after `model.` or `model.layers.N.`."""
LINEAR_NAMES: Mapping[str, tuple[str, ...]] = {ours: (theirs,) for theirs, ours in MINDFORMERS_NAMES.items()} | {
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w_gate_hidden": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Linears of a layer and the linears each contains: with qkv_concat True, several joined by row."""
FUSED_NAMES = ("attention.w_qkv", "feed_forward.w_gate_hidden")
"""The fused ones, whose row order is detected in `fused_order.py`."""
ROW_PARALLEL = ("attention.wo", "feed_forward.w2")
"""Linears that MindFormers slices by column; it slices all others by row."""
RTN_NAMES: Mapping[str, str] = {
    "weight": "_handler.weight",
    "weight_scale": "_weight_quantizer.scale",
    "weight_zero": "_weight_quantizer.zp_neg",
}
"""By role, the suffix after the name of a linear that was rounded to nearest, in the order of real files."""
ROLES: Mapping[str, str] = {rest: role for role, rest in RTN_NAMES.items()} | {
    "weight": "float",
    "bias": "bias",
    "_input_quantizer.t_scale": "input_scale",
    "_input_quantizer.t_zp": "input_zero",
    "_output_quantizer.scale": "dequant_scale",
    "_handler.bias": "bias",
    "_layer.weight": "weight",
    "_layer.matmul.t_scale": "weight_scale",
    "_layer.matmul.t_zp_neg": "weight_zero",
    "input_scale": "input_scale",
    "input_zp": "input_zero",
    "_layer.matmul.dequant_scale": "dequant_scale",
    "_layer.bias": "bias",
    # Golden Stick 1.0
    "_layer.matmul.weight_scale": "weight_scale",
    "_layer.matmul.weight_zp": "weight_zero",
    "_layer.matmul.smooth_scale": "smooth_scale",
    # Not known from any release: whether inputs are divided or multiplied by it.
    "smooth_scale": "unknown_scale",
    "_input_quantizer.smooth_scale": "unknown_scale",
}
"""The roles of name suffixes, for RTN and SmoothQuant (first) and for PTQ."""
FORMS: Mapping[frozenset[str], LinearScheme | None] = {
    frozenset({"float"}): None,
    frozenset({"weight", "weight_scale", "weight_zero"}): LinearScheme(packed=False),
    # Golden Stick 1.0: activations are rounded per token, and no zero points are stored.
    frozenset({"weight", "weight_scale"}): LinearScheme(packed=False, activation="token"),
    # Golden Stick 1.0 multiplies the inputs by these factors first.
    frozenset({"weight", "weight_scale", "smooth_scale"}): LinearScheme(packed=False, activation="token", smooth=True),
    frozenset({"weight", "weight_scale", "weight_zero", "smooth_scale"}): LinearScheme(packed=False, smooth=True),
    frozenset({"weight", "input_scale", "input_zero", "dequant_scale"}): LinearScheme(
        packed=False, activation="tensor", activation_symmetric=False, smooth=True
    ),
}
"""Storage form of a linear with these roles (a bias aside); None: float."""
LEFTOVERS = re.compile(
    r"(.*\.)?(_weight_observer_cell|_(key|value)_input_quantizer)\..*"
    r"|.*\.(key_value_t_scale|key_value_t_zp|key_cache|value_cache)"
    r"|.*\._layer\.matmul\.input_(scale|zp)"
    r"|(adam_m|adam_v|moment1|moment2|moments|accum|accu_grads|stat)\..*"
    r"|(global_step|epoch_num|step_num|learning_rate|lr|loss_scale|scale_sense|beta[12]_power|(current|last_overflow)_iterator_step)"
)
"""Leftovers of training and calibration: not needed, or a second copy."""
CACHE_ZEROS = (".paged_attention_mgr.key_t_zp", ".paged_attention_mgr.value_t_zp")
"""Suffixes of tensors that have to be 0."""


def split_name(name: str) -> tuple[str, str]:
    """Split a name into `model.layers.N.` or `model.`, and the rest."""
    match = re.match(r"model\.(layers\.\d+\.)?", name)
    end = match.end() if match else 0
    return name[:end], name[end:]
