"""MindFormers' safetensors files in the form that `mindspore_header.py` uses for `.ckpt`: same names and layouts, another container."""

from pathlib import Path

from model.checkpoint.mindspore_header import TYPE_NAMES, MindSporeHeader, StoredTensor, read_mindspore_header
from model.checkpoint.safetensors_file import read_header
from parallel.file_slices import FileReader


def read_any_header(path: Path, reader: FileReader, key_file: Path | None) -> MindSporeHeader:
    """Read every tensor entry of a `.ckpt` or `.safetensors` file. Raises CheckpointError if it is missing,
    corrupt or cannot be decrypted.
    """
    if path.suffix != ".safetensors":
        return read_mindspore_header(path, reader, key_file)
    tensors = {
        name: StoredTensor(stored.info.shape, TYPE_NAMES[stored.info.dtype], ((stored.offset_bytes, stored.info.num_bytes),))
        for name, stored in read_header(path).items()
    }
    return MindSporeHeader(tensors, None, None)
