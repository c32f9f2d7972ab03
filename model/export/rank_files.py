"""Write rank files: one safetensors file per rank and layout.json; `model/checkpoint/rank_files.py` reads them."""

from collections.abc import Callable
from pathlib import Path

from model.checkpoint.folder_writing import write_folder, write_json
from model.checkpoint.rank_files import FORMAT_VERSION, LAYOUT_FILE, rank_file_name, read_sample
from model.checkpoint.safetensors_file import SafetensorsWriter
from model.checkpoint.source import CheckpointSource, read_pieces
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.tensor_info import TensorInfo
from model.spec.weights import plan_weights
from model.text.tokenizer_files import write_tokenizer
from parallel.file_slices import FileReader


def write_rank_files(
    source: CheckpointSource,
    config: LlamaConfig,
    scheme: Scheme,
    world_size: int,
    target: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `source` as `world_size` rank files into the folder `target`; return the number of bytes read.

    Holds only a few pieces of a tensor at a time (see `read_pieces`). `on_progress` is called with (bytes written, total bytes). Raises
    LayoutError when the model has too few units.
    """
    config.layout().check(world_size)
    specs = plan_weights(config, scheme)
    rows = {name: [spec.rows(rank, world_size) for rank in range(world_size)] for name, spec in specs.items()}
    infos = [
        {
            name: TensorInfo((stop - start, *spec.shape[1:]), source.tensors[name].dtype)
            for name, spec in specs.items()
            for start, stop in [rows[name][r]]
        }
        for r in range(world_size)
    ]
    total = sum(info.num_bytes for rank in infos for info in rank.values())
    reader, done = FileReader(), 0
    hashes, fingerprints = {}, {}
    with write_folder(target) as folder:
        for rank in range(world_size):
            file = rank_file_name(rank, world_size)
            with SafetensorsWriter(folder / file, infos[rank]) as writer:
                for name in infos[rank]:
                    for piece in read_pieces(source, reader, name, *rows[name][rank]):
                        writer.write(name, piece)
                        done += piece.nbytes
                        on_progress(done, total)
            hashes[file], fingerprints[file] = writer.sha256, read_sample(folder / file)
        write_json(
            folder / LAYOUT_FILE,
            {
                "format_version": FORMAT_VERSION,
                "world_size": world_size,
                "scheme": scheme.name,
                "files": hashes,
                "fingerprints": fingerprints,
                "tensors": {name: {"shape": list(spec.shape), "rows": [list(part) for part in rows[name]]} for name, spec in specs.items()},
            },
        )
        write_json(folder / "config.json", source.config)
        write_tokenizer(source.tokenizer_path(), folder)
    reader.close()
    return reader.read_bytes
