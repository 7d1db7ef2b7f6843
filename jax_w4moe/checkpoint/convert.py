"""Any checkpoint to packed experts on disk: ``python -m jax_w4moe convert SOURCE DESTINATION``.

One file per MoE layer, one per source file for its other tensors, then the index. A file appears
under its name when it is whole, the index after all of them: a conversion that was killed at any
moment goes on where it was when it is started again, and its result is the same bytes.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jax_w4moe.checkpoint import packed
from jax_w4moe.checkpoint.base import DiskFormat, LayerOnDisk, detect
from jax_w4moe.checkpoint.families import check_sizes
from jax_w4moe.checkpoint.files import INDEX_FILE, CheckpointFiles
from jax_w4moe.checkpoint.loading import load_experts
from jax_w4moe.formats import LAYOUT_VERSION, WeightFormat

STATE_FILE = "conversion.json"
_COPIED = (".json", ".txt", ".model", ".jinja")  # beside the tensors: config, tokenizer
_PARTIAL = ".partial"  # the folder of what is not whole yet


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    quantize: WeightFormat | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Writes a checkpoint whose experts are packed; everything else is copied.

    Args:
      source: a checkpoint folder that :func:`load_experts` reads.
      destination: a folder: missing, empty, or of the same conversion when it was interrupted.
      quantize: the format to round float experts (bf16, FP8) to; MXFP4_WIDE also for MXFP4 ones
        whose scales lie too far apart, which are not rounded; else None.
      progress: called with (files done, files in all, bytes of them written by this call).

    Raises:
      FileNotFoundError, ValueError, TypeError, NotImplementedError: as :func:`load_experts`, for
        any layer, before anything is written; or the source is packed already.
      FileExistsError: the destination holds something else.
      OSError: too little space on the disk.
    """
    folder = Path(destination)
    with CheckpointFiles(source) as files:
        disk_format = detect(files)
        if disk_format is packed.PACKED:
            raise ValueError(f"{source} is packed already; load it as it is, or copy it.")
        layers = [
            disk_format.layer(files, number, quantize) for number in disk_format.layers(files)
        ]
        rest = _rest(files, disk_format, layers)
        for on_disk in layers:
            check_sizes(files, on_disk)
        outputs: list[_Experts | _Rest] = [
            *(_Experts(files, disk_format, on_disk, quantize) for on_disk in layers),
            *(_Rest(files, number, names) for number, names in enumerate(rest)),
        ]
        _claim(folder, files, quantize)
        missing = [output for output in outputs if not (folder / output.file).exists()]
        _check_space(folder, sum(output.nbytes for output in missing))
        written = 0
        for done, output in enumerate(outputs, 1):
            if output in missing:
                _write(folder / output.file, output.tensors(), output.metadata)
                written += output.nbytes
            if progress is not None:
                progress(done, len(outputs), written)
        for file in sorted(files.folder.iterdir()):
            if file.suffix in _COPIED and file.name != INDEX_FILE:
                _replace(folder / file.name, file.read_bytes())
        weight_map = {name: output.file for output in outputs for name in output.names}
        total = sum(output.nbytes for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _replace(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        shutil.rmtree(folder / _PARTIAL)


class _Experts:
    """The packed experts of a layer."""

    def __init__(
        self,
        files: CheckpointFiles,
        disk_format: DiskFormat,
        on_disk: LayerOnDisk,
        quantize: WeightFormat | None,
    ) -> None:
        self.file = f"experts-{on_disk.layer:05}.safetensors"
        self.metadata = packed.metadata(disk_format, on_disk)
        abstract = packed.named_arrays(on_disk.packed())
        self._names = {name: f"{on_disk.prefix}experts.{name}" for name in abstract}
        self.names = list(self._names.values())
        self.nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
        self._files, self._layer, self._quantize = files, on_disk.layer, quantize

    def tensors(self) -> dict[str, np.ndarray]:
        experts = load_experts(self._files, self._layer, quantize=self._quantize)
        arrays = packed.named_arrays(experts)
        return {self._names[name]: np.asarray(array) for name, array in arrays.items()}


class _Rest:
    """What else is in one of the source's files."""

    def __init__(self, files: CheckpointFiles, number: int, names: list[str]) -> None:
        self.file = f"rest-{number:05}.safetensors"
        self.metadata = {"format": "pt"}
        self.names = names
        self.nbytes = sum(files.info(name).nbytes for name in names)
        self._files = files

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: self._files.read(name) for name in self.names}


def _rest(
    files: CheckpointFiles, disk_format: DiskFormat, layers: list[LayerOnDisk]
) -> list[list[str]]:
    """The tensors that are copied, by source file; of dtypes that can be."""
    replaced = set().union(*(disk_format.replaced(files, on_disk) for on_disk in layers))
    by_file: dict[Path, list[str]] = {}
    for name in sorted(files.names.keys() - replaced):
        files.numpy_dtype(name)
        by_file.setdefault(files.names[name], []).append(name)
    return [by_file[file] for file in sorted(by_file)]


def _claim(folder: Path, files: CheckpointFiles, quantize: WeightFormat | None) -> None:
    """Says in the folder which conversion it is of; refuses one that is of another."""
    sources = {file.name: file.stat().st_size for file in sorted(set(files.names.values()))}
    state = {
        "layout_version": LAYOUT_VERSION,
        "quantize": None if quantize is None else quantize.name,
        "source": sources,
    }
    content = (json.dumps(state, indent=2) + "\n").encode()
    found = folder / STATE_FILE
    if found.exists():
        if found.read_bytes() != content:
            raise FileExistsError(
                f"{found} is of another conversion (other source files, quantize or layout"
                " version); pass an empty folder, or delete this one."
            )
        return
    if folder.exists() and any(entry.name != _PARTIAL for entry in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; pass an empty or a missing folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(found, content)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed} bytes are to be written, {free} are free; make room or pass a"
            " folder on another disk."
        )


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    partial = _partial(path)
    save_file(tensors, partial, metadata=metadata)
    _publish(partial, path)


def _replace(path: Path, content: bytes) -> None:
    partial = _partial(path)
    partial.write_bytes(content)
    _publish(partial, path)


def _partial(path: Path) -> Path:
    """Where a file is written, with whatever else its writer leaves there when it is killed."""
    folder = path.parent / _PARTIAL
    folder.mkdir(exist_ok=True)
    return folder / path.name


def _publish(partial: Path, path: Path) -> None:
    """Gives a whole file its name, once its bytes are on the disk."""
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)
