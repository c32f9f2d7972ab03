"""How MindFormers and Golden Stick 0.6 name the tensors of a Llama, and the canonical name of each.

Knows names; no files, no ranks. Linears without their role stand in `MINDFORMERS_NAMES` of `model/spec/weights.py`.
"""

import re
from collections.abc import Mapping

from model.spec.scheme import LinearScheme
from model.spec.weights import MINDFORMERS_NAMES

PLAIN_NAMES: Mapping[str, str] = {
    "tok_embeddings.embedding_weight": "embed_tokens.weight",
    "norm_out.weight": "norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.infer_attention.paged_attention_mgr.key_t_scale": "self_attn.k_scale",
    "attention.infer_attention.paged_attention_mgr.value_t_scale": "self_attn.v_scale",
}
"""Tensors that are no part of a linear, by what follows `model.` or `model.layers.N.`."""
LINEAR_NAMES: Mapping[str, tuple[str, ...]] = {ours: (theirs,) for theirs, ours in MINDFORMERS_NAMES.items()} | {
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w_gate_hidden": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Linears of a layer, and what each holds: with qkv_concat True, several under each other."""
FUSED_NAMES = ("attention.w_qkv", "feed_forward.w_gate_hidden")
"""Those of several, whose row order is told in `fused_order.py`."""
ROW_PARALLEL = ("attention.wo", "feed_forward.w2")
"""MindFormers cuts their columns, and the rows of all other linears."""
RTN_NAMES: Mapping[str, str] = {
    "weight": "_handler.weight",
    "weight_scale": "_weight_quantizer.scale",
    "weight_zero": "_weight_quantizer.zp_neg",
}
"""By role, what follows the name of a linear that was rounded to nearest, in the order of real files."""
ROLES: Mapping[str, str] = {rest: role for role, rest in RTN_NAMES.items()} | {
    "weight": "float",
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
    "smooth_scale": "smooth_scale",
    "_layer.matmul.smooth_scale": "smooth_scale",
    "_input_quantizer.smooth_scale": "smooth_scale",
}
"""What follows a linear's name, for RTN and SmoothQuant (first) and for PTQ, and what it is."""
FORMS: Mapping[frozenset[str], LinearScheme | None] = {
    frozenset({"float"}): None,
    frozenset({"weight", "weight_scale", "weight_zero"}): LinearScheme(packed=False),
    # Golden Stick 1.0: activations are rounded for each token, and no zero points are stored.
    frozenset({"weight", "weight_scale"}): LinearScheme(packed=False, activation="token"),
    frozenset({"weight", "input_scale", "input_zero", "dequant_scale"}): LinearScheme(
        packed=False, activation="tensor", activation_symmetric=False, smooth=True
    ),
}
"""How a linear with these roles, a bias aside, is stored; None: float."""
LEFTOVERS = re.compile(
    r"(.*\.)?(_weight_observer_cell|_(key|value)_input_quantizer)\..*"
    r"|.*\.(key_value_t_scale|key_value_t_zp|key_cache|value_cache)"
    r"|.*\._layer\.matmul\.input_(scale|zp)"
    r"|(adam_m|adam_v|moment1|moment2|moments|accum|accu_grads|stat)\..*"
    r"|(global_step|epoch_num|step_num|learning_rate|lr|loss_scale|scale_sense|beta[12]_power|(current|last_overflow)_iterator_step)"
)
"""What training and calibration leave in a file: nothing that a run needs, or a second copy of it."""
CACHE_ZEROS = (".paged_attention_mgr.key_t_zp", ".paged_attention_mgr.value_t_zp")
"""Ends of the names of what has to be 0."""


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.N.` or `model.`, and the rest."""
    match = re.match(r"model\.(layers\.\d+\.)?", name)
    end = match.end() if match else 0
    return name[:end], name[end:]
