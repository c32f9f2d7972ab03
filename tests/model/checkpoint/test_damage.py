"""Damage to checkpoints of every format: what cannot be used is refused with one error, and costs no memory.

Whole small checkpoints are cut, changed byte by byte and, where they are JSON, value by value; then everything in them is read.
Beside these, GGUF files and settings with one damage each, and what is said of it. Knows no formats: `conftest.py` makes them.
"""

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint.gguf_file import GgufFile
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from parallel.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tests.model.checkpoint.conftest import Checkpoint

MEMORY_BYTES, ADDRESS_BYTES = 300 << 20, 2 << 30
CUTS, BYTES, VALUES = (settings(max_examples=count, deadline=None, derandomize=True) for count in (60, 120, 120))
NUMBERS = [0, 1, 7, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
ENDS = 2000
"""Headers and directories lie in so many bytes at the start and at the end of a file."""

json_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, "", "x", "../x", [], {}, [[]], [None], {"a": 1}, float("nan"), float("inf"), 0.5, 8.0]),
    st.sampled_from([*NUMBERS, -1, 1 << 16, 10**9, 10**40, 10**400]),
    st.sampled_from(
        ["group", "channel", "tensor", "static", "re:(", "gptq", "llama3", "float32", "I8", "F64", "\ud800", "a\nb", "9" * 5000]
    ),
)


def read_status(key: str) -> int:
    """Bytes of a line of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Fails when the peak grows by MEMORY_BYTES; asking for ADDRESS_BYTES at once fails on the spot."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    limits, before = resource.getrlimit(resource.RLIMIT_AS), read_status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (read_status("VmSize") + ADDRESS_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert read_status("VmHWM") - before < MEMORY_BYTES


def draw_file(data: st.DataObject, files: dict[Path, Any]) -> Path:
    return data.draw(st.sampled_from(sorted(files)))


def draw_place(data: st.DataObject, size: int) -> int:
    return data.draw(st.one_of(st.integers(0, min(ENDS, size - 1)), st.integers(max(0, size - ENDS), size - 1), st.integers(0, size - 1)))


def damage_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Bytes overwritten, inserted, left out, or all but the first ones replaced."""
    place = draw_place(data, len(content))
    number = st.sampled_from(NUMBERS).map(lambda value: struct.pack("<Q", value))
    kind = data.draw(st.sampled_from(["flip", "overwrite", "number", "insert", "delete", "repeat", "random"]))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "repeat":
        return content[:place] + content[data.draw(st.integers(0, place)) :]
    if kind == "random":
        return content[: data.draw(st.sampled_from([0, 4, 8, 16]))] + data.draw(st.binary(max_size=300))
    new = data.draw(number if kind == "number" else st.binary(min_size=1, max_size=16))
    skip = {"insert": 0, "delete": len(new)}.get(kind, len(new))
    return content[:place] + (b"" if kind == "delete" else new) + content[place + skip :]


def list_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from list_places(inner, (*path, key))


def damage_json(data: st.DataObject, value: Any) -> Any:
    """One value in it replaced or left out."""
    changed = json.loads(json.dumps(value))
    *parents, last = data.draw(st.sampled_from(list(list_places(value))))
    inner = changed
    for key in parents:
        inner = inner[key]
    if data.draw(st.integers(0, 5)):
        inner[last] = data.draw(json_values)
    else:
        del inner[last]
    return changed


@CUTS
@given(data=st.data())
def test_a_weight_file_that_is_cut_anywhere_is_refused(checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, checkpoint.weights)
    content = checkpoint.weights[file]
    assert not checkpoint.read_with(file, content[: draw_place(data, len(content))])


@BYTES
@given(data=st.data())
def test_a_weight_file_with_other_bytes_is_read_as_declared_or_refused(checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, checkpoint.weights)
    checkpoint.read_with(file, damage_bytes(data, checkpoint.weights[file]))


@VALUES
@given(data=st.data())
def test_a_header_with_another_value_is_read_as_declared_or_refused(safetensors_checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, safetensors_checkpoint.weights)
    content = safetensors_checkpoint.weights[file]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(damage_json(data, json.loads(content[8 : 8 + length]))).encode()
    safetensors_checkpoint.read_with(file, struct.pack("<Q", len(header)) + header + content[8 + length :])


@VALUES
@given(data=st.data())
def test_settings_with_another_value_are_read_as_declared_or_refused(configured_checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, configured_checkpoint.settings)
    configured_checkpoint.read_with(file, json.dumps(damage_json(data, configured_checkpoint.settings[file])).encode())


@BYTES
@given(data=st.data())
def test_settings_with_other_bytes_are_read_as_declared_or_refused(configured_checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, configured_checkpoint.settings)
    configured_checkpoint.read_with(file, damage_bytes(data, json.dumps(configured_checkpoint.settings[file]).encode()))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, offset: int, *shape: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + content


LLAMA = key("general.architecture", 8, text("llama"))
FIRST, SECOND = tensor("a", 0, 8), tensor("b", 32, 8)
UINT32, STRING, ARRAY, Q8_0 = 4, 8, 9, 8


def build_gguf(keys: list[bytes], tensors: list[bytes], *, counts: tuple[int, int] | None = None, content: int = 64) -> bytes:
    """A file of these keys and tensors, padded to 32 bytes, and `content` bytes of elements."""
    header = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32 + content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (build_gguf([], [], counts=(1 << 40, 0)), f"claims to have {1 << 40} tensors, but at most 131072"),
        (build_gguf([], [], counts=(0, 1 << 63)), f"claims to have {1 << 63} keys, but at most 131072"),
        (build_gguf([LLAMA], [FIRST], counts=(9, 1)), "names a tensor '', which cannot be a name: copy it again"),
        (build_gguf([struct.pack("<Q", 1 << 62)], []), rf"needs {1 << 62} bytes, more than the rest of its \d+ bytes: copy it again"),
        (build_gguf([key("k", STRING, struct.pack("<Q", 1000))], []), "a text at byte .* needs 1000 bytes, more than the rest"),
        (build_gguf([key("k", ARRAY, array(UINT32, 1 << 20))], []), f"the array k at byte .* needs {4 << 20} bytes, more than the rest"),
        (build_gguf([key("k", ARRAY, array(UINT32, 1 << 61))], []), f"k holds an array of {1 << 61} elements, but at most"),
        (build_gguf([key("k", ARRAY, array(STRING, 1 << 20))], []), "needs 8 bytes, more than the rest"),
        (build_gguf([key("k", ARRAY, array(ARRAY, 1) * 9)], []), "k holds arrays in arrays, 5 deep, but at most 4 deep"),
        (build_gguf([key("k", 13, b"")], []), "k is of type 13, but GGUF has the types 0 to 12"),
        (build_gguf([LLAMA, LLAMA], []), r"holds the key general\.architecture twice"),
        (build_gguf([LLAMA], [FIRST, FIRST]), "holds the tensor a twice"),
        (build_gguf([key("a\nb", UINT32, number(1))], []), r"names a key 'a\\nb', which cannot be a name"),
        (build_gguf([key("general.alignment", UINT32, number(0))], []), r"general\.alignment is 0, but a power of two"),
        (build_gguf([key("general.alignment", UINT32, number(48))], []), r"general\.alignment is 48, but a power of two up to 1048576"),
        (build_gguf([key("general.alignment", UINT32, number(1 << 31))], []), rf"general\.alignment is {1 << 31}, but a power of two"),
        (build_gguf([key("general.alignment", STRING, text("32"))], []), r"general\.alignment is '32', but a power of two"),
        (build_gguf([LLAMA], [tensor("a", 0, 1, 1, 1, 1, 1)]), "a has 5 dimensions, but 1 to 4 can be"),
        (build_gguf([LLAMA], [tensor("a", 0)]), "a has 0 dimensions, but 1 to 4 can be"),
        (build_gguf([LLAMA], [tensor("a", 0, 8, 0)]), r"a has shape \[0, 8\], but sizes of at least 1"),
        (build_gguf([LLAMA], [FIRST, tensor("b", 33, 8)]), "b begins at byte 33, which is no multiple of 32"),
        (build_gguf([LLAMA], [FIRST, tensor("b", 0, 8)]), r"b begins at byte \d+ instead of \d+: copy it again"),
        (build_gguf([LLAMA], [FIRST, tensor("b", 64, 8)], content=96), r"b begins at byte \d+ instead of \d+: copy it again"),
        (build_gguf([LLAMA], [FIRST, tensor("b", 32, 9)]), r"has \d+ bytes, but b reaches byte \d+: copy it again"),
        (build_gguf([LLAMA], [tensor("a", 0, 1 << 63, 1 << 63)]), r"has \d+ bytes, but a reaches byte \d{39}"),
        (build_gguf([LLAMA], [FIRST, SECOND], content=100), r"has \d+ bytes, but its tensors end at byte \d+: copy it again"),
        (build_gguf([LLAMA], [tensor("a", 0, 32, kind=Q8_0)]), "a is a vector of type Q8_0, but vectors are floats"),
        (build_gguf([LLAMA], [tensor("a", 0, 8, 4, kind=Q8_0)]), "rows of 8 elements do not divide into Q8_0 blocks of 32"),
        (build_gguf([LLAMA], [tensor("a", 0, 8, kind=99)]), "a has type number 99, but only F32"),
        (build_gguf([key("general.architecture", UINT32, number(1))], []), r"general\.architecture is 1, but a text is needed"),
        (build_gguf([LLAMA, key("split.count", STRING, text("2"))], []), r"split\.count is '2', but a whole number"),
        (build_gguf([LLAMA, key("llama.embedding_length", STRING, text("8"))], [FIRST, SECOND]), r"embedding_length is '8', but one whole"),
    ],
)
def test_a_damaged_gguf_file_is_refused_with_what_was_found(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001, but a whole number from 1 to 10000 is needed"),
        ({"vocab_size": 1 << 32}, f"vocab_size is {1 << 32}, but a whole number from 1 to"),
        ({"max_position_embeddings": 1 << 31}, f"max_position_embeddings is {1 << 31}, but a whole number"),
        ({"hidden_size": "32"}, "hidden_size is '32', but a whole number"),
        ({"intermediate_size": [32]}, r"intermediate_size is \[32\], but a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True, but a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, but a whole number"),
        ({"head_dim": -16}, "head_dim is -16, but a whole number"),
        ({"vocab_size": 10**400}, r"vocab_size is 1000\d*\.\.\.\d*, but a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, but a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, but a number above 0"),
        ({"rope_theta": -1e4}, "rope_theta is -10000.0, but a number above 0"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', but an object is needed"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, r"rope_scaling \['llama3'\] is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq_factor, .*, which 'llama3' needs"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor of rope_scaling is '8', but a number above 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling: low_freq_factor is 4.0, but it has to be below high_.*, 4.0"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is '</s>', but a whole number from 0"),
        ({"bos_token_id": -1}, "bos_token_id is -1, but a whole number from 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', but true or false is needed"),
        ({"torch_dtype": {"a": 1}}, r"dtype \{'a': 1\} is unknown; there are float32"),
        ({"hidden_act": {}}, r"hidden_act is \{\}, but only 'silu' or 'swish' is supported"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], but only .*'llama', "),
    ],
)
def test_a_damaged_setting_is_refused_with_key_and_value(changes: dict[str, Any], message: str) -> None:
    assert build_config(SIZES).hidden_size == 32
    with pytest.raises(ConfigError, match=rf"^config\.json: {message}"):
        build_config(SIZES | changes)


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "dynamic": False}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), [1], r"quantization_config is \[1\], but an object is needed"),
        (("quant_method",), {"a": 1}, r"quant_method \{'a': 1\} is not supported"),
        (("config_groups",), ["g"], r"config_groups is \['g'\], but an object is needed"),
        (("config_groups", "g"), 7, "the group of config_groups is 7, but an object is needed"),
        (("config_groups", "g", "targets"), {}, r"targets is \{\}, but a list of names is needed"),
        (("config_groups", "g", "targets"), [], r"targets \[\] are not supported; 'Linear', full names and 're:' patterns are"),
        (("config_groups", "g", "targets"), ["LlamaAttention"], r"targets \['LlamaAttention'\] are not supported"),
        (("config_groups", "g", "format"), [1], r"format \[1\] is not supported"),
        (("config_groups", "g", "weights"), "int4", "weights is 'int4', but an object is needed"),
        (("config_groups", "g", "input_activations"), [8], r"input_activations is \[8\], but an object is needed"),
        (("config_groups", "g", "weights", "num_bits"), True, "weights of True bits are not supported"),
        (("config_groups", "g", "weights", "num_bits"), 4.0, r"weights of 4\.0 bits are not supported"),
        (("config_groups", "g", "weights", "strategy"), [], r"strategy of weights is \[\], but only 'channel' or 'group'"),
        (("config_groups", "g", "weights", "group_size"), "16", "group_size is '16', but a whole number from 1"),
        (("config_groups", "g", "weights", "group_size"), 0, "group_size is 0, but a whole number from 1"),
        (("config_groups", "g", "weights", "group_size"), None, "weights lack group_size, which strategy 'group' needs"),
        (("config_groups", "g", "weights", "symmetric"), "yes", "symmetric is 'yes', but true or false is needed"),
        (("config_groups", "g", "weights", "actorder"), 1, "actorder 1 is not supported"),
        (("kv_cache_scheme",), "int8", "kv_cache_scheme is 'int8', but an object is needed"),
        (("ignore",), "lm_head", "ignore is 'lm_head', but a list of names is needed"),
        (("ignore",), ["re:("], r"'re:\(' in ignore is no pattern"),
        (("ignore",), ["re:(a+)+b"], r"the pattern 're:\(a\+\)\+b' in ignore is not supported"),
    ],
)
def test_a_damaged_quantization_config_is_refused_at_any_depth(place: tuple[str, ...], value: Any, message: str) -> None:
    group = {"targets": ["Linear"], "weights": dict(WEIGHTS), "input_activations": None}
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}, "ignore": ["lm_head"]}
    raw: dict[str, Any] = {"quantization_config": declared}
    assert read_scheme(raw).name == "a16w4-g16"
    *parents, last = ("quantization_config", *place)
    inner = raw
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    with pytest.raises(ConfigError, match=message):
        read_scheme(raw)
