"""The keys of `quantization_config` in each dialect, and the methods that are recognized without being supported."""

from model.spec.key_table import KeyTable

COMPRESSED_KEYS = KeyTable(
    name="quantization_config of compressed-tensors",
    read=frozenset({"quant_method", "format", "config_groups", "ignore", "kv_cache_scheme"}),
    fixed={
        "quantization_status": ("compressed",),
        "transform_config": (),
        "moe_sparsity_config": (),
    },
    harmless=frozenset({"global_compression_ratio", "version", "sparsity_config", "run_compressed"}),
)
GROUP_KEYS = KeyTable(
    name="a group of config_groups",
    read=frozenset({"targets", "format", "weights", "input_activations"}),
    fixed={"output_activations": ()},
)
ARGUMENT_KEYS = KeyTable(
    name="weights, input_activations or kv_cache_scheme",
    read=frozenset({"num_bits", "type", "symmetric", "strategy", "dynamic", "group_size", "actorder", "block_structure"}),
    harmless=frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}),
)
GPTQ_KEYS = KeyTable(
    name="quantization_config of GPTQ",
    read=frozenset({"quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "is_marlin_format", "dynamic"}),
    fixed={
        "pack_dtype": ("int32",),
        "rotation": (),
        "adapter": (),
        "mock_quantization": (False,),
    },
    harmless=frozenset(
        {
            "act_group_aware",
            "backend",
            "batch_size",
            "block_name_to_quantize",
            "cache_block_outputs",
            "cache_examples_on_gpu",
            "damp_auto_increment",
            "damp_percent",
            "dataset",
            "device",
            "disable_exllama",
            "exllama_config",
            "gptaq",
            "gptaq_alpha",
            "gptaq_memory_device",
            "hyb_act",
            "lm_head",
            "max_input_length",
            "meta",
            "model_file_base_name",
            "model_name_or_path",
            "model_seqlen",
            "module_name_preceding_first_block",
            "modules_in_block_to_quantize",
            "modules_to_not_convert",
            "mse",
            "offload_to_disk",
            "offload_to_disk_path",
            "pack_impl",
            "pad_token_id",
            "parallel_packing",
            "quantizer",
            "static_groups",
            "tokenizer",
            "true_sequential",
            "use_cuda_fp16",
            "use_exllama",
            "v2",
            "v2_alpha",
            "v2_memory_device",
        }
    ),
)
"""The tensors tell which linears are quantized, so `lm_head` and the lists of modules need not be read."""
AWQ_KEYS = KeyTable(
    name="quantization_config of AWQ",
    read=frozenset({"quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version"}),
    fixed={"backend": ("autoawq",), "pack_dtype": ("int32",)},
    harmless=frozenset(
        {
            "checkpoint_format",
            "do_fuse",
            "exllama_config",
            "format",
            "fuse_max_seq_len",
            "lm_head",
            "meta",
            "modules_to_fuse",
            "modules_to_not_convert",
            "sym",
            "desc_act",
        }
    ),
)
AUTO_ROUND_KEYS = KeyTable(
    name="quantization_config of AutoRound",
    read=frozenset({"quant_method", "packing_format", "backend", "bits", "group_size", "sym", "data_type", "extra_config"}),
    fixed={"act_bits": (16, 32), "static_attention_dtype": (), "static_kv_dtype": (), "super_bits": (), "super_group_size": ()},
    harmless=frozenset(
        {
            "act_data_type",
            "act_dynamic",
            "act_group_size",
            "act_sym",
            "amp",
            "autoround_version",
            "batch_size",
            "block_name_to_quantize",
            "damp_percent",
            "dataset",
            "desc_act",
            "enable_minmax_tuning",
            "enable_norm_bias_tuning",
            "enable_quanted_input",
            "gradient_accumulate_steps",
            "iters",
            "low_gpu_mem_usage",
            "lr",
            "minmax_lr",
            "modules_to_not_convert",
            "nsamples",
            "provider",
            "quant_block_list",
            "quant_lm_head",
            "scale_dtype",
            "seqlen",
            "to_quant_block_names",
            "true_sequential",
            "version",
            "zero_point",
        }
    ),
)
FLOAT8_KEYS = KeyTable(
    name="quantization_config of fp8",
    read=frozenset({"quant_method", "weight_block_size"}),
    fixed={
        "activation_scheme": ("dynamic", "static"),
        "fmt": ("e4m3", "float8_e4m3fn", "float8_e4m3"),
        "scale_fmt": ("float", "ue8m0"),
        "expert_dtype": ("fp8",),
    },
    harmless=frozenset({"dequantize", "ignored_layers", "kv_cache_scheme", "modules_to_convert", "modules_to_not_convert"}),
)
"""The tensors tell which linears are quantized. `ue8m0` scales are powers of two; those that are stored as F8_E8M0 are refused."""
FBGEMM_KEYS = KeyTable(
    name="quantization_config of fbgemm_fp8",
    read=frozenset({"quant_method"}),
    harmless=frozenset({"activation_scale_ub", "modules_to_not_convert"}),
)
MODELOPT_KEYS = KeyTable(
    name="quantization_config of modelopt",
    read=frozenset({"quant_method", "quant_algo"}),
    fixed={"pre_quant_scale": (False,), "has_zero_point": (False,), "quantized_layers": ()},
    harmless=frozenset(
        {"config_groups", "exclude_modules", "group_size", "ignore", "kv_cache_quant_algo", "kv_cache_scheme", "producer", "quant_type"}
    ),
)
MODELOPT_FILE_KEYS = KeyTable(
    name="hf_quant_config.json",
    read=frozenset({"quant_algo"}),
    fixed={"pre_quant_scale": (False,), "has_zero_point": (False,), "quantized_layers": ()},
    harmless=frozenset({"exclude_modules", "group_size", "kv_cache_quant_algo"}),
)
OTHER_METHODS = {
    "aqlm": "AQLM",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2 (exl2)",
    "exl3": "ExLlamaV3 (exl3)",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF inside a Hugging Face folder",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "marlin": "Marlin",
    "modelopt_fp4": "ModelOpt FP4",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "sqllm": "SqueezeLLM",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""Known but unsupported values of `quant_method`, with their names."""
TOLD_BY_TENSORS = frozenset({"gptq", "awq", "auto-round", "autoround", "intel/auto-round", "fp8", "fbgemm_fp8", "modelopt"})
"""Supported methods whose folders have readers that declare them as compressed-tensors."""
SUPPORTED_METHODS = "compressed-tensors (int8, int4, fp8), gptq, awq, auto-round, fp8, fbgemm_fp8, modelopt (fp8)"
