"""Small whole checkpoints of every format that can be read, to be damaged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.torch import save_file

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import OpenOptions, open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.export.mindspore import write_mindspore
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from model.spec.weights import MINDFORMERS_NAMES, plan_weights
from parallel.errors import InputError
from parallel.file_slices import FileReader
from tests.model.checkpoint.float8_files import write_float8
from tests.model.gguf_blocks import write_blocks
from tests.model.mindspore_files import cut, write_ckpt

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
INT8 = Scheme(LinearScheme(packed=False, activation="token"), ("re:lm_.*",), "tensor")
KEY = bytes(range(16))
GROUP = 16
MAX_MESSAGE = 3000


def make_tensors(scheme: Scheme) -> dict[str, torch.Tensor]:
    """Every tensor that the model needs."""
    torch.manual_seed(2)
    specs = plan_weights(build_config(LLAMA), scheme)
    kinds = {name: getattr(torch, "float16" if "float16" in spec.dtypes else spec.dtypes[0]) for name, spec in specs.items()}
    return {name: torch.randn(spec.shape).abs().mul(9).to(kinds[name]) for name, spec in specs.items()}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_single(folder: Path) -> Path:
    return write_folder(folder, make_tensors(Scheme()), LLAMA)


def make_bin(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(make_tensors(Scheme()), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def make_indexed(folder: Path) -> Path:
    tensors = make_tensors(Scheme())
    places = {name: f"model-{1 + (number % 2)}.safetensors" for number, name in enumerate(tensors)}
    write_folder(folder, {}, LLAMA)
    (folder / "model.safetensors").unlink()
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def make_compressed(folder: Path) -> Path:
    return write_folder(folder, make_tensors(INT8), declare_scheme(LLAMA, INT8))


def make_words(folder: Path, settings: dict[str, Any], packed_dim: int) -> Path:
    """GPTQ packs the inputs of qweight into words, AWQ the outputs."""
    tensors = make_tensors(Scheme())
    for name in [name for name in tensors if "proj" in name]:
        linear, sizes = name.removesuffix(".weight"), list(tensors.pop(name).T.shape)
        groups, outputs = sizes[0] // GROUP, sizes[1]
        sizes[packed_dim] //= 8
        tensors[f"{linear}.qweight"] = torch.randint(-(1 << 31), 1 << 31, sizes).int()
        tensors[f"{linear}.qzeros"] = torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{linear}.scales"] = torch.rand(groups, outputs).half()
        if not packed_dim:
            tensors[f"{linear}.g_idx"] = (torch.arange(groups * GROUP) // GROUP).int()
            tensors[f"{linear}.bias"] = torch.zeros(outputs).half()
    return write_folder(folder, tensors, LLAMA | {"quantization_config": settings})


def make_gptq(folder: Path) -> Path:
    return make_words(folder, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}, 0)


def make_auto_round(folder: Path) -> Path:
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": GROUP, "sym": True}
    return make_words(folder, settings | {"extra_config": {"lm_head": {"bits": 16}}}, 0)


def make_awq(folder: Path) -> Path:
    return make_words(folder, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, 1)


def make_gguf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in (make_tensors(Scheme()) | {"rope_freqs.weight": torch.ones(8)}).items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight",)) or name
        writer.add_tensor(target, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


def make_split_gguf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return write_blocks(folder / "m.gguf", lambda name: gguf.GGMLQuantizationType.Q4_K, part_tensors=8)


def make_float8(folder: Path) -> Path:
    return write_float8(make_single(folder.with_name("float8-source")), folder, "block", "fp8")[0]


def make_float_quantized(folder: Path) -> Path:
    return write_float8(make_single(folder.with_name("float-source")), folder, "channel", "compressed-tensors-static")[0]


def make_mindspore(folder: Path) -> Path:
    source = open_checkpoint(make_single(folder / "source"))
    write_mindspore(source, build_config(source.config), Scheme(), folder / "m.ckpt", None, lambda done, total: None)
    return folder / "m.ckpt"


def make_encrypted(folder: Path) -> Path:
    path = make_mindspore(folder)
    plain, out = path.read_bytes(), b""
    for start in range(0, len(plain), 5000):
        nonce = bytes(12)
        sealed = AESGCM(KEY).encrypt(nonce, plain[start : start + 5000], None)
        cipher, tag = sealed[:-16], sealed[-16:]
        lengths = (24 + len(cipher)).to_bytes(4, "little") + (16).to_bytes(4, "little")
        out += bytes([0xD8, 0x5E, 0x3A, 0x7F]) + tag + lengths + nonce + bytes(4) + len(cipher).to_bytes(4, "little") + cipher
    path.write_bytes(out)
    return path


def make_ranks(folder: Path) -> Path:
    source = open_checkpoint(make_single(folder / "source"))
    write_rank_files(source, build_config(source.config), Scheme(), 2, folder / "ranks")
    return folder / "ranks"


def make_meta(folder: Path) -> Path:
    words = {"self_attn.": "attention.w", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
    words |= {"mlp.up_proj": "feed_forward.w3", "_proj": "", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    words |= {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": ""}
    tensors = {}
    for name, tensor in make_tensors(Scheme()).items():
        for old, new in words.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def make_modelslim(folder: Path) -> Path:
    tensors = make_tensors(Scheme())
    for name in [name for name in tensors if "proj" in name]:
        rows = tensors[name].shape[0]
        tensors[name] = torch.randint(-128, 128, tensors[name].shape, dtype=torch.int8)
        tensors |= {f"{name}_scale": torch.rand(rows, 1), f"{name}_offset": torch.zeros(rows, 1)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "quant_model_weight_w8a16.safetensors")
    described = {name: "W8A16" if "proj" in name else "FLOAT" for name in tensors}
    (folder / "quant_model_description_w8a16.json").write_text(json.dumps({"model_quant_type": "W8A16"} | described))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def rename_to_mindformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float tensors under MindFormers' names."""
    words = {f".{theirs}.": f".{ours}." for theirs, ours in MINDFORMERS_NAMES.items()}
    words |= {"model.embed_tokens.weight": "model.tok_embeddings.embedding_weight", "model.norm.": "model.norm_out."}
    words |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    out = {}
    for name, tensor in tensors.items():
        for old, new in words.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def make_named(folder: Path) -> Path:
    """MindFormers' safetensors in two files, with the file that says which holds what."""
    tensors = rename_to_mindformers(make_tensors(Scheme()))
    places = {name: f"part-{1 + (number % 2)}.safetensors" for number, name in enumerate(tensors)}
    folder.mkdir(parents=True)
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file, metadata={"format": "ms"})
    (folder / "param_name_map.json").write_text(json.dumps(places))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def make_rank_folders(folder: Path) -> Path:
    """MindFormers' safetensors of two slices, each with a replica and an older step."""
    tensors = rename_to_mindformers(make_tensors(Scheme()))
    config = LLAMA | {"num_key_value_heads": 2}
    for name in [name for name in tensors if name.endswith(("wk.weight", "wv.weight"))]:
        tensors[name] = torch.randn(32, 32).half()
    parts = cut(tensors, 2)
    for rank in range(4):
        (folder / f"rank_{rank}").mkdir(parents=True)
        for step in (1, 2):
            part = {name: tensor * step for name, tensor in parts[rank % 2].items()}
            save_file(part, folder / f"rank_{rank}" / f"m_rank_{rank}-{step}_9.safetensors", metadata={"format": "ms"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_fused(folder: Path) -> Path:
    """One file of fused tensors in the row order of MindFormers 1.4; up rows are three times as long as gate rows."""
    tensors = rename_to_mindformers(make_tensors(Scheme()))
    parts = {"w_qkv": ("wq", "wk", "wv"), "w_gate_hidden": ("w1", "w3")}
    for fused, names in parts.items():
        found = [next(name for name in tensors if f".{one}." in name) for one in names]
        rows = [tensors.pop(name) for name in found]
        target = found[0].replace(names[0], fused)
        tensors[target] = torch.stack([rows[0], rows[1] * 3], dim=1).flatten(0, 1) if len(rows) == 2 else torch.cat(rows)
    write_ckpt(folder / "m.ckpt", {name: tensor.contiguous() for name, tensor in tensors.items()}, crc=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder / "m.ckpt"


@dataclass(frozen=True)
class Format:
    """How a checkpoint of one format is made, and which of its files are damaged, by patterns of their names."""

    make: Callable[[Path], Path]
    """Writes it into a new folder; gives the path to open."""
    weights: str = "**/*.safetensors"
    settings: str = "**/*.json"
    quotes: bool = True
    """Messages repeat what a file says in printable characters and cut."""


FORMATS = {
    "hf": Format(make_single),
    "hf-indexed": Format(make_indexed),
    "compressed-tensors": Format(make_compressed),
    "gptq": Format(make_gptq),
    "awq": Format(make_awq),
    "auto-round": Format(make_auto_round),
    "fp8": Format(make_float8, "fp8/*.safetensors", "fp8/*.json"),
    "float-quantized": Format(make_float_quantized, "fp8/*.safetensors", "fp8/*.json"),
    "gguf": Format(make_gguf, "*.gguf"),
    "gguf-split": Format(make_split_gguf, "*.gguf"),
    "mindspore": Format(make_mindspore, "*.ckpt", "*.json", quotes=False),
    "mindspore-encrypted": Format(make_encrypted, "*.ckpt", "*.json", quotes=False),
    "mindspore-fused": Format(make_fused, "*.ckpt", "*.json", quotes=False),
    "mindformers-safetensors": Format(make_named, quotes=False),
    "mindformers-ranks": Format(make_rank_folders, "**/*-2_9.safetensors", quotes=False),
    "modelslim": Format(make_modelslim),
    "ranks": Format(make_ranks, "ranks/*.safetensors", "ranks/*.json", quotes=False),
    "bin": Format(make_bin, "*.bin", quotes=False),
    "meta": Format(make_meta, "*.pth", quotes=False),
}


class Checkpoint:
    """A good checkpoint, one file of which at a time is replaced."""

    def __init__(self, name: str, folder: Path) -> None:
        self._format = FORMATS[name]
        self.path = self._format.make(folder / "c")
        shutil.rmtree(folder / "c" / "source", ignore_errors=True)
        self.weights = {file: file.read_bytes() for file in sorted((folder / "c").glob(self._format.weights))}
        self.settings = {file: json.loads(file.read_text()) for file in sorted((folder / "c").glob(self._format.settings))}
        (folder / "key").write_bytes(KEY)
        self._options = OpenOptions(key_file=str(folder / "key") if "encrypted" in name else None)
        assert self.weights and self.read(), name

    def open(self) -> CheckpointSource:
        """Its source."""
        return open_checkpoint(self.path, self._options)

    def read(self) -> bool:
        """Read everything as a run would; False when it is refused. Tensors have to be what was declared."""
        try:
            source = self.open()
            config, scheme = build_config(source.config), read_scheme(source.config)
            check_checkpoint(source, config, scheme)
            reader = FileReader()
            try:
                for name, info in source.tensors.items():
                    rows = source.read_rows(reader, name, 0, info.shape[0] if info.shape else 1)
                    assert (tuple(rows.shape) == (info.shape or (1,))) and rows.dtype == info.dtype.torch_dtype, name
            finally:
                reader.close()
        except InputError as error:
            if self._format.quotes and (not str(error).isprintable() or len(str(error)) > MAX_MESSAGE):
                raise AssertionError(f"no message for a line: {error!a}") from None
            return False
        return True

    def read_with(self, file: Path, content: bytes) -> bool:
        """`read` with another content of one file."""
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            return self.read()
        finally:
            file.write_bytes(before)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A function that gives the good checkpoint of a format, by its key in FORMATS."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            made[name] = Checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session", params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    """A good checkpoint of each format."""
    return make_checkpoint(request.param)


@pytest.fixture(scope="session", params=[name for name in FORMATS if not name.startswith("gguf")])
def configured_checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    """A good checkpoint of each format that has settings beside its weights."""
    return make_checkpoint(request.param)


SAFETENSORS = (
    *("hf", "hf-indexed", "compressed-tensors", "gptq", "awq", "fp8", "float-quantized", "ranks", "modelslim"),
    *("mindformers-safetensors", "mindformers-ranks"),
)


@pytest.fixture(scope="session", params=SAFETENSORS)
def safetensors_checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    """A good checkpoint of each format that stores its weights as safetensors."""
    return make_checkpoint(request.param)
