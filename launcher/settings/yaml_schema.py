"""Schema of a MindFormers YAML file: keys that affect a run, their types, and keys that are ignored.

Covers names, types and ranges; their effects are in `launcher/settings/yaml_settings.py`.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from launcher.settings.options import CollectivesName, Device
from launcher.settings.other_models import check_model, count_experts
from launcher.settings.yaml_family import list_names
from launcher.settings.yaml_null import is_null
from model.spec.config import DTYPES
from model.spec.run_scheme import PRECISIONS
from parallel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A key that affects the run. Null, also spelled None, is always accepted and means unset."""

    types: tuple[type, ...]
    """Accepted types; an integer is accepted for a float."""
    at_least: float | None = None
    """Inclusive lower bound."""
    above: float | None = None
    """Exclusive lower bound."""
    at_most: float | None = None
    """Inclusive upper bound."""
    choices: tuple[Any, ...] | None = None
    """The only accepted values besides null."""
    items: type | None = None
    """Type of each item, if the value is a list."""
    hint: str = ""
    """How to fix a value that is not accepted."""
    check: Callable[[Any], bool] | None = None
    """An additional condition."""
    needed: str = ""
    """Description of accepted values, if types and bounds are not sufficient."""

    def __post_init__(self) -> None:
        assert self.types, "a key without types would accept nothing"

    def accepts(self, value: Any) -> bool:
        """Return whether the run can use this value."""
        if self.check is not None and not self.check(value):
            return False
        if not any(_has_type(value, kind) for kind in self.types):
            return False
        if self.choices is not None:
            return value in self.choices
        if not isinstance(value, list):
            return self._within_bounds(value)
        return all((self.items is None or _has_type(item, self.items)) and self._within_bounds(item) for item in value)

    def _within_bounds(self, value: Any) -> bool:
        if not isinstance(value, (int, float)):
            return True
        at_least, above, at_most = self.at_least, self.above, self.at_most
        return (at_least is None or value >= at_least) and (above is None or value > above) and (at_most is None or value <= at_most)

    def describe(self) -> str:
        """Describe the accepted values."""
        if self.needed:
            return self.needed
        if self.choices is not None:
            return " or ".join(repr(choice) for choice in (*self.choices, None))
        words = " or ".join(_TYPE_WORDS[kind] for kind in self.types)
        bounds = (("of at least", self.at_least), ("above", self.above), ("of at most", self.at_most))
        limits = " and ".join(f"{name} {bound}" for name, bound in bounds if bound is not None)
        return " ".join(filter(None, (words, limits, f"(every item: {_TYPE_WORDS[self.items]})" if self.items else "")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored:
    """A key of MindFormers that is ignored, including everything below it."""

    warning: str = ""
    """Note for the user; empty if ignoring it is harmless."""
    harmless: tuple[Any, ...] = (None, False, 0, "", "None", {}, [])
    """Values that need no warning."""
    only: Value | None = None
    """Accepted values, if others would request something unsupported."""


Schema: TypeAlias = "Mapping[str, Value | Ignored | Schema]"

_SHORT = 5
"""Length of keys in which one wrong letter is a large part."""
_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}


def _ignore(names: str) -> dict[str, Ignored]:
    return {name: Ignored() for name in names.split()}


_TEXT = Value(types=(str,))
_FLAG = Value(types=(bool,))
_COUNT = Value(types=(int,), at_least=1)
_NATURAL = Value(types=(int,), at_least=0)
_POSITIVE = Value(types=(float,), above=0)
_DTYPE = Value(types=(str,), choices=tuple(DTYPES))
_PRECISION = Value(types=(str,), choices=PRECISIONS)

_NO_BIAS = Value(types=(bool,), choices=(False,), hint="biases of the output projection are not supported")
_DENSE = Ignored(
    only=Value(
        types=(dict,),
        check=lambda value: isinstance(value, Mapping) and not count_experts(value),
        needed="a dense model (expert_num 1)",
        hint="mixtures of experts are read from Hugging Face folders only",
    )
)
"""MindFormers' default moe_config describes a dense model."""

_CUSTOM_CODE = Ignored(warning="code that comes with a model is not run, so this is the model that arch.type names")

_QUANTIZATION_CONFIG: Schema = {
    "quant_method": _TEXT,
    "weight_dtype": _TEXT,
    "activation_dtype": _TEXT,
    "kvcache_dtype": _TEXT,
    "outliers_suppression": _TEXT,
    "modules_to_not_convert": Value(types=(list,), items=str),
    "algorithm_args": {
        "alpha": Value(types=(float,), at_least=0, at_most=1),
        "smooth_alpha": Value(types=(float,), at_least=0, at_most=1),
    },
}

_MODEL_CONFIG: Schema = {
    "type": Value(types=(str,), choices=list_names("Config")),
    "seq_length": _COUNT,
    "hidden_size": _COUNT,
    "num_layers": _COUNT,
    "num_heads": _COUNT,
    "n_kv_heads": _COUNT,
    "vocab_size": _COUNT,
    "max_position_embedding": _COUNT,
    "max_position_embeddings": _COUNT,
    "intermediate_size": _COUNT,
    "multiple_of": _COUNT,
    "ffn_dim_multiplier": _POSITIVE,
    "rms_norm_eps": _POSITIVE,
    "theta": _POSITIVE,
    "tie_word_embeddings": _FLAG,
    "bos_token_id": _NATURAL,
    "eos_token_id": Value(types=(int, list), at_least=0, items=int),
    "pad_token_id": _NATURAL,
    "compute_dtype": _DTYPE,
    "max_decode_length": _COUNT,
    "block_size": _COUNT,
    "num_blocks": _COUNT,
    "do_sample": _FLAG,
    "top_k": _NATURAL,
    "top_p": Value(types=(float,), above=0, at_most=1),
    "repetition_penalty": _POSITIVE,
    "temperature": _POSITIVE,
    "quantization_config": _QUANTIZATION_CONFIG,
    "extend_method": Value(
        types=(str,), choices=("LLAMA3", "YARN", "linear", "PI", "NTK"), hint="other ways of scaling rotary positions are not supported"
    ),
    "scaling_factor": Value(types=(float, dict)),
    "qkv_has_bias": _FLAG,
    "add_qkv_bias": _FLAG,
    "attn_proj_has_bias": _NO_BIAS,
    "moe_config": _DENSE,
    "pet_config": Ignored(warning="adapters are not supported, so the base model runs alone"),
    **_ignore(
        "batch_size ignore_token_id layernorm_compute_type softmax_compute_type rotary_dtype param_init_type embedding_init_type"
        " router_dense_type qkv_concat use_past is_dynamic use_rope_slice use_flash_attention use_attn_mask_compression"
        " use_ring_attention use_eod_attn_mask_compression fused_rms_norm parallel_optimizer fine_grain_interleave pp_interleave_num"
        " offset init_method_std parallel_config checkpoint_name_or_path quant parallel_decoding_params"
        " return_extra_loss llm_backend boost_model_name initializer_range num_block pretrain_seqlen compute_in_2d use_past_shard auto_map"
        " layernorm_compute_dtype softmax_compute_dtype params_dtype mlp_concat infer_seq_length emb_dropout_prob"
        " residual_dtype input_sliced_sig rmsnorm_compute_2d chunk_prefill calculate_per_token_loss return_hidden_states rl_config"
        " auto_register ffn_concat use_kvcache_op is_flexible_shape use_paged_attention use_prompt_flash_attention"
        " use_incre_flash_attention start_stage stage_num"
    ),
}

SCHEMA: Schema = {
    "seed": _NATURAL,
    "load_checkpoint": _TEXT,
    "pretrained_model_dir": _TEXT,
    "run_mode": Ignored(
        only=Value(types=(str,), choices=("predict",), hint="the command determines the task, and none of them trains: set it to predict")
    ),
    "only_save_strategy": Ignored(
        only=Value(types=(bool,), choices=(False,), hint="MindFormers would write strategy files and exit: set it to False to predict")
    ),
    "moe_config": _DENSE,
    "base_config": Value(types=(str, list, dict), choices=(), hint="files are not included; write its keys into this one"),
    "parallel_config": {
        "model_parallel": _COUNT,
        "pipeline_stage": Ignored(warning="only model_parallel splits the model over ranks", harmless=(None, "None", 0, 1)),
        **_ignore(
            "data_parallel context_parallel expert_parallel micro_batch_num seq_split_num recompute use_seq_parallel optimizer_shard"
            " gradient_aggregation_group vocab_emb_dp context_parallel_algo ulysses_degree_in_cp mem_coeff"
        ),
    },
    "model": {
        "model_config": _MODEL_CONFIG,
        "arch": {"type": Value(types=(str,), choices=list_names("ForCausalLM")), "auto_register": _CUSTOM_CODE},
    },
    "processor": {
        "tokenizer": {
            "vocab_file": _TEXT,
            "tokenizer_file": _TEXT,
            "chat_template": _TEXT,
            "add_bos_token": _FLAG,
            "add_eos_token": _FLAG,
            **_ignore(
                "type unk_token bos_token eos_token pad_token model_max_length max_length"
                " padding padding_side truncation_side legacy auto_map clean_up_tokenization_spaces checkpoint_name_or_path"
                " auto_register additional_special_tokens merges_file add_special_tokens tokenizer_class use_fast"
            ),
        },
        **_ignore("type return_tensors image_processor audio_processor"),
    },
    "tandem": {
        "threads_per_rank": _COUNT,
        "collectives": Value(types=(str,), choices=get_args(CollectivesName)),
        "device": Value(types=(str,), choices=get_args(Device)),
        "ranks_per_device": _COUNT,
        "memory_fraction": _POSITIVE,
        "dtype": _DTYPE,
        "activations": _PRECISION,
        "lm_head": _PRECISION,
        "temperature": _POSITIVE,
        "max_batch_size": _COUNT,
        "prefix_cache": _FLAG,
        "speculate": _FLAG,
        "max_restarts": _NATURAL,
        "timeout_seconds": _POSITIVE,
        "max_new_tokens": _COUNT,
        "log_dir": _TEXT,
        # YAML parses an unquoted 1.3 as a number.
        "fused_order": Value(types=(str, float), choices=("auto", "1.3", "1.4", 1.3, 1.4)),
    },
    **_ignore(
        "output_dir use_parallel parallel context trainer runner_config runner_wrapper optimizer lr_schedule metric callbacks"
        " eval_callbacks train_dataset train_dataset_task eval_dataset eval_dataset_task do_eval eval_step_interval eval_epoch_interval"
        " recompute_config swap_config micro_batch_interleave_num resume_training resume_by_meta ignore_data_skip"
        " data_skip_steps src_strategy_path_or_dir auto_trans_ckpt transform_process_num transform_by_rank"
        " npu_num_per_node load_ckpt_format load_ckpt_async save_file input_data predict_batch_size adapter_id auto_tune filepath_prefix"
        " autotune_per_step profile profile_start_step profile_stop_step profile_rank_ids profile_pipeline profile_level"
        " profile_communication profile_memory init_start_profile layer_scale layer_decay lr_scale lr_scale_factor remote_save_url"
        " print_separate_loss infer_precision_sync train_precision_sync postprocess_use_numpy exclude_cann_cpu"
        " monitor_config remove_redundancy use_legacy use_legacy_format trust_remote_code generation kernel_launch_group"
    ),
}
"""All known keys of the file, nested as in the file."""


def check_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of ignored keys, in file order.

    Raises ConfigError for unknown keys, for values that the run cannot use, and for models that are not supported.
    """
    check_model(raw)
    ignored = []
    for path, node, value in _walk(raw, SCHEMA, ""):
        allowed = node.only if isinstance(node, Ignored) else node
        if isinstance(node, Ignored):
            ignored.append(path)
        if allowed is not None and not is_null(value) and not allowed.accepts(value):
            raise ConfigError(_explain(path, allowed, value))
    return ignored


def list_warnings(raw: Mapping[str, Any]) -> list[str]:
    """Return warnings about ignored keys. Takes a mapping accepted by `check_keys`."""
    return [
        f"{path} is ignored: {node.warning}"
        for path, node, value in _walk(raw, SCHEMA, "")
        if isinstance(node, Ignored) and node.warning and value not in node.harmless
    ]


def _walk(raw: Any, schema: Schema, prefix: str) -> Iterator[tuple[str, Value | Ignored, Any]]:
    if is_null(raw):
        return
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {raw!r}, but a mapping is needed")
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if key not in schema:
            raise ConfigError(f"{path} is not a known key; {_suggest(str(key), schema, prefix)}")
        node = schema[key]
        if isinstance(node, Mapping):
            yield from _walk(value, node, f"{path}.")
        else:
            yield path, node, value


def _suggest(key: str, schema: Schema, prefix: str) -> str:
    """Suggest a likely correction only: the same key in another section, or a typo or the start of a key in this section."""
    elsewhere = [path for path in _list_paths(SCHEMA, "") if path.rpartition(".")[2] == key]
    near_here = difflib.get_close_matches(key, schema, n=1, cutoff=0.85 if len(key) > _SHORT else 0.6)
    near_here += [name for name in schema if name.startswith(f"{key}_")]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    if near_here:
        return f"did you mean {prefix}{near_here[0]}?"
    return "no known key is similar: remove it, or see configs/ for examples"


def _list_paths(schema: Schema, prefix: str) -> Iterator[str]:
    for key, node in schema.items():
        yield f"{prefix}{key}"
        if isinstance(node, Mapping):
            yield from _list_paths(node, f"{prefix}{key}.")


def _has_type(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:  # the bounds also reject nan and infinities
        return isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max
    return isinstance(value, kind)


def _explain(path: str, node: Value, value: Any) -> str:
    hint = node.hint
    if isinstance(value, str) and float in node.types and _reads_as_number(value):
        hint = f"YAML parses {value} as text: write a number with a point, as in 1.0e-5"
    return f"{path} is {value!r} ({type(value).__name__}), but {node.describe()} is needed" + (f"; {hint}" if hint else "")


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
