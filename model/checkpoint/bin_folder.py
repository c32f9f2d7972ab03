"""A Hugging Face folder whose weights are files of torch.save: pytorch_model.bin, or several with an index.

`torch_header.py` checks each pickle against an allow list before loading it with `weights_only=True`, and locates the tensors, so that a
rank reads only the bytes of its rows.
"""

from pathlib import Path

from model.checkpoint.hf_folder import HuggingFaceFolder, WeightFiles
from model.checkpoint.safetensors_file import StoredTensor
from model.checkpoint.source import Checksum
from model.checkpoint.torch_header import read_torch_header

BIN_FILES = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin")
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


class BinFolder(HuggingFaceFolder):
    """Such a folder; opening it reads the headers. Raises the errors of HuggingFaceFolder and `read_torch_header`."""

    weight_files = BIN_FILES

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        self._found_checksums: dict[Path, Checksum] = {}
        super().__init__(path, follow_links=follow_links)
        self.checksums = self._found_checksums | self.checksums
        self.notes += (f"{path} holds pickles ({self.files[0].name}): convert them once with tandem convert, which writes safetensors",)

    def _read_header(self, file: Path) -> dict[str, StoredTensor]:
        tensors, self._found_checksums[file] = read_torch_header(file, _IGNORED_SUFFIX)
        return {name: StoredTensor(found.info, found.offset_bytes) for name, found in tensors.items()}


def is_bin(path: Path) -> bool:
    """Return whether a folder holds config.json and such files."""
    return BIN_FILES.exist(path)
