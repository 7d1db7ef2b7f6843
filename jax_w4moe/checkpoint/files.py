"""An opened checkpoint: one or many safetensors files, looked up by tensor name.

Names, dtypes and shapes come from headers, which the safetensors library checks. Data is read here,
since the library gives no array of F8_E8M0 or F8_E4M3, and reads with one thread at a time. A shard
is opened when a tensor of it is first asked for, so those of other layers may even be missing.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

try:
    import safetensors
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jax_w4moe.checkpoint needs safetensors, which is not installed; run"
        " pip install 'jax_w4moe[checkpoint]'.",
        name="safetensors",
    ) from error

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

_LFS_POINTER = b"version https://git-lfs"
_HEADER_LENGTH_BYTES = 8  # little endian, before the header
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
      name: the tensor's name.
      file: the safetensors file that holds it.
      dtype: in safetensors' spelling, e.g. "U8" or "BF16".
      shape: as stored.
      offset: where its bytes begin in the file.
      nbytes: how many they are.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


@dataclasses.dataclass(frozen=True)
class _Shard:
    """An open file: its descriptor, and what its header says."""

    descriptor: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class CheckpointFiles:
    """The tensors of a checkpoint folder or file; a context manager that closes what it opened.

    Attributes:
      path: what was opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Finds the files and, with an index, reads it; opens no shard.

        Args:
          path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or one
            ``.safetensors`` file.

        Raises:
          FileNotFoundError: there is no such path, or no checkpoint in it.
          ValueError: the index is damaged.
        """
        self.path = Path(path)
        self._open_files = contextlib.ExitStack()
        self._shards: dict[Path, _Shard] = {}
        self._opening = threading.Lock()
        if not self.path.exists():
            raise FileNotFoundError(
                f"checkpoint {str(self.path)!r} does not exist; pass a local folder with"
                f" {SINGLE_FILE} or {INDEX_FILE} (a Hub name must be downloaded first)."
            )
        self.folder = self.path if self.path.is_dir() else self.path.parent

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shards.clear()
        self._open_files.close()

    @functools.cached_property
    def names(self) -> dict[str, Path]:
        """Every tensor's name and the file that holds it."""
        if self.path.is_file():
            return dict.fromkeys(self._keys(self.path), self.path)
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.is_file():
            return dict.fromkeys(self._keys(single), single)
        if index.is_file():
            return _weight_map(index)
        found = sorted(entry.name for entry in self.path.iterdir())
        raise FileNotFoundError(
            f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE} (it holds"
            f" {_some(found) or 'nothing'}); pass the checkpoint's own folder, or one .safetensors"
            " file."
        )

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The parsed ``config.json`` beside the tensors, or None if there is none.

        Raises:
          ValueError: it is not a JSON object.
        """
        file = self.folder / CONFIG_FILE
        return _json_object(file) if file.is_file() else None

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config, of its ``text_config`` where models of text and images have one.

        Args:
          key: the value's name.
          default: what stands for one that is not there.
        """
        config = self.config or {}
        nested = config.get("text_config")
        if isinstance(nested, dict) and key in nested:
            return nested[key]
        return config.get(key, default)

    @property
    def quantization(self) -> dict[str, Any]:
        """The config's ``quantization_config``, empty if there is none."""
        found = self.setting("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def opened(self) -> frozenset[Path]:
        """The safetensors files opened so far."""
        return frozenset(self._shards)

    def info(self, name: str) -> TensorInfo:
        """Looks a tensor up in its file's header.

        Raises:
          FileNotFoundError: the index names a file that is not there.
          ValueError: there is no such tensor, or its file is damaged.
        """
        file = self._file_of(name)
        tensors = self._shard(file).tensors
        if name not in tensors:
            raise ValueError(
                f"{self.folder / INDEX_FILE} says that {name} is in {file.name}, which holds no"
                " such tensor; the index and the shards are of different downloads: download both"
                " again."
            )
        return tensors[name]

    def metadata(self, file: Path) -> dict[str, str]:
        """What a file's header says beside its tensors."""
        return self._shard(file).metadata

    def numpy_dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor is read in.

        Raises:
          TypeError: none is known for the stored one.
        """
        info = self.info(name)
        if info.dtype not in _DTYPES:
            raise TypeError(
                f"{info} has dtype {info.dtype}, which is not read here; need one of"
                f" {', '.join(_DTYPES)}."
            )
        return np.dtype(_DTYPES[info.dtype])

    def read(self, name: str, index: int | None = None) -> Any:
        """Reads a tensor, or one entry along its first axis. May be called by several threads.

        Args:
          name: the tensor's name; :meth:`info` has accepted it.
          index: reads [index : index + 1] only, keeping the axis; None reads everything.

        Returns:
          A numpy array in the stored dtype (BF16, F8_E4M3 and F8_E8M0 as those of ml_dtypes).

        Raises:
          TypeError: as :meth:`numpy_dtype`.
          ValueError: the file has become shorter since it was opened.
        """
        info, dtype = self.info(name), self.numpy_dtype(name)
        shape = info.shape if index is None else (1, *info.shape[1:])
        array = np.empty(shape, dtype)
        offset = info.offset + (index or 0) * array.nbytes
        left: Any = memoryview(array.reshape(-1).view(np.uint8).data)
        while left:  # the system may return less than it was asked for
            count = os.preadv(self._shard(info.file).descriptor, [left], offset)
            if count == 0:
                raise ValueError(f"{info}: the file ends within it; download it again.")
            left, offset = left[count:], offset + count
        return array

    def _file_of(self, name: str) -> Path:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5)
            raise ValueError(
                f"{self.path} holds no tensor {name}; the nearest of its {len(self.names)} names"
                f" are {_some(near) or 'not alike'}: check the layer number and that the download"
                " is complete."
            )
        return self.names[name]

    def _keys(self, file: Path) -> list[str]:
        return list(self._shard(file).tensors)

    def _shard(self, file: Path) -> _Shard:
        with self._opening:
            if file not in self._shards:
                self._shards[file] = self._open(file)
            return self._shards[file]

    def _open(self, file: Path) -> _Shard:
        if not file.is_file():
            raise FileNotFoundError(
                f"{self.folder / INDEX_FILE} names {file.name}, which is not in {self.folder};"
                " download it again."
            )
        try:
            with safetensors.safe_open(file, framework="numpy"):
                pass  # it has checked that header and file fit together
        except safetensors.SafetensorError as error:
            raise ValueError(_damaged(file, error)) from error
        stream = self._open_files.enter_context(file.open("rb"))
        length = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        begin = _HEADER_LENGTH_BYTES + length
        tensors = {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = TensorInfo(
                name, file, entry["dtype"], shape, begin + first, end - first
            )
        return _Shard(stream.fileno(), tensors, metadata)


@contextlib.contextmanager
def opened(path: "AnyPath") -> Iterator[CheckpointFiles]:
    """The files at a path; files that are open already stay so."""
    if isinstance(path, CheckpointFiles):
        yield path
        return
    with CheckpointFiles(path) as files:
        yield files


AnyPath = str | os.PathLike[str] | CheckpointFiles


def _damaged(file: Path, error: Exception) -> str:
    with file.open("rb") as stream:
        pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    if pointer:
        return f"{file} is a Git LFS pointer, not the tensors; run git lfs pull in {file.parent}."
    return (
        f"{file} is truncated or not a safetensors file ({file.stat().st_size} bytes: {error});"
        " download it again."
    )


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a JSON {type(content).__name__}, need an object; download it again."
        )
    return content


def _weight_map(index: Path) -> dict[str, Path]:
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index} has no weight_map from tensor names to files; download it again."
        )
    for name, file in weight_map.items():
        # A shard lies beside its index; anything else would make a download read other files.
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{index} maps {name} to {file!r}, need the name of a file beside the index;"
                " download it again."
            )
    return {name: index.parent / file for name, file in weight_map.items()}


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
