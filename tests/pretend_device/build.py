"""Builds the pretend accelerator: a folder that, on PYTHONPATH, gives PyTorch the device `npu`. It is built once per PyTorch version."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.utils.cpp_extension import include_paths, library_paths

_SOURCES = Path(__file__).resolve().parent
_NAME = "pretend_npu"
_MODULE = "torch_npu"
"""The real plugin's name, by which tandem sees that it is installed."""


def build(cache: Path) -> Path:
    """Return the folder to put on PYTHONPATH. Raises FileNotFoundError without g++, CalledProcessError if it does not compile."""
    source, module = (_SOURCES / f"{_NAME}{suffix}" for suffix in (".cpp", ".py"))
    state = hashlib.sha256(torch.__version__.encode() + source.read_bytes() + module.read_bytes()).hexdigest()[:16]
    folder = cache / f"{_NAME}-{state}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(dir=cache))
    try:
        includes = [f"-I{path}" for path in include_paths()]
        libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
        # -w: the warnings are those of PyTorch's headers.
        options = ["-std=c++20", "-O1", "-g0", "-w", "-fPIC", "-shared", *includes]
        subprocess.run(
            [os.environ.get("CXX", "g++"), *options, source, "-o", work / f"lib{_NAME}.so", *libraries, "-ltorch_cpu", "-lc10"], check=True
        )
        shutil.copy(module, work / f"{_MODULE}.py")
        described = work / f"{_NAME}-1.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 1\n")
        (described / "entry_points.txt").write_text(f"[torch.backends]\n{_MODULE} = {_MODULE}:autoload\n")
        try:
            work.rename(folder)
        except OSError:  # another test process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
