"""The safetensors format, and directories of shards in it.

A file is the length of a header (8 bytes), the header (JSON: name -> dtype, shape, offsets) and the bytes of the
tensors. It is read through memory maps, and written tensor by tensor: the library of that name writes only what is in
memory as a whole.
"""

import dataclasses
import fnmatch
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

# Bytes per value of those that may stand in a file, whether or not we can use them.
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}
_SIZES |= {f"{kind}{bits}": bits // 8 for kind in "IU" for bits in (8, 16, 32, 64)}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_HEADER = 100_000_000  # bytes; as in the library


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    path: pathlib.Path
    name: str
    dtype: str  # as in the header: "BF16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self) -> np.ndarray:
        """A read-only memory map. Raises ValueError for a dtype that is not in DTYPES."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: {self.name!r} has dtype {self.dtype}; weights must be {', '.join(DTYPES)}. If this is a "
                "quantized release, take the one in bfloat16, or dequantize it first."
            )
        dtype = DTYPES[self.dtype]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        return np.memmap(self.path, dtype, mode="r", offset=self.offset, shape=self.shape)


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a file, without their values. Raises ValueError that says in which way the file is damaged."""

    def damaged(how: str) -> ValueError:
        return ValueError(f"{path} is no sound safetensors file: {how}. Download or copy it again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise damaged("it is a pointer of Git LFS, not the file itself (git lfs pull fetches that)")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MOST_HEADER):
            raise damaged(f"its {size} bytes end within the header, or it is of another format")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: Entry(path, name, str(one["dtype"]), tuple(map(int, one["shape"])), int(one["data_offsets"][0]))
                for name, one in header.items()
            }
            spans = sorted((*map(int, one["data_offsets"]), name) for name, one in header.items())
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise damaged(f"its header cannot be read ({type(error).__name__}: {error})") from error
    end = 0
    for begin, stop, name in spans:
        size_of = _SIZES.get(entries[name].dtype)
        fits = size_of is None or stop - begin == math.prod(entries[name].shape) * size_of
        if begin != end or stop < begin or not fits:
            raise damaged(
                f"the header gives {name!r} bytes {begin} to {stop}, which does not fit its shape or the rest"
            )
        end = stop
    if 8 + length + end != size:
        raise damaged(f"the header speaks of {8 + length + end} bytes, but it has {size}")
    return {name: dataclasses.replace(one, offset=8 + length + one.offset) for name, one in entries.items()}


def read_directory(directory: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a model, in one file or in shards with an index.

    Raises FileNotFoundError when a shard is missing, ValueError when index and shards contradict each other, when a
    file is damaged, or when the weights are pickled: those can run any code when they are loaded, and never are.
    """
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    shards = {path.name for path in directory.glob("*.safetensors")}
    if not (directory / INDEX).is_file():
        pickled = [p.name for p in sorted(directory.iterdir()) if any(fnmatch.fnmatch(p.name, g) for g in _PICKLES)]
        if not shards and pickled:
            raise ValueError(
                f"{directory} holds its weights in {pickled[0]}, a pickle, which is never loaded: it may run any code. "
                "Take a release in safetensors, or convert it where you trust it."
            )
        what = f"there are {', '.join(sorted(shards))}, but no {INDEX}" if shards else "there are no safetensors files"
        raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}: {what}.")
    index = _read_index(directory / INDEX)
    named = set(index.values())
    if missing := sorted(named - shards):
        raise FileNotFoundError(f"{directory / INDEX} names {missing[0]}, which is not there ({len(missing)} missing).")
    if stray := sorted(name for name in shards - named if fnmatch.fnmatch(name, "model-*-of-*.safetensors")):
        raise ValueError(f"{directory / INDEX} does not name the shard {stray[0]}. It belongs to another model, or the "
                         "index does: download both again.")  # fmt: skip
    entries: dict[str, Entry] = {}
    for name in sorted(named):
        for key, entry in read_header(directory / name).items():
            if index.get(key) != name:
                where = f"says it is in {index[key]}" if key in index else "does not name it"
                raise ValueError(f"{directory / name} holds {key!r}, but the index {where}. Download both again.")
            entries[key] = entry
    if absent := sorted(index.keys() - entries.keys()):
        raise ValueError(f"{directory / index[absent[0]]} lacks {absent[0]!r}, which the index says it holds.")
    return entries


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise TypeError("weight_map must map names to files")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). Download it again.") from error
    outside = [file for file in index.values() if pathlib.PurePath(file).name != file]
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}: shards must lie beside their index.")
    return index


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_directory(
    directory: pathlib.Path | None,
    planned: Iterable[Planned],
    read: Callable[[Planned], np.ndarray],
    *,
    shard_bytes: int,
) -> None:
    """Writes shards of at most `shard_bytes` (or of one tensor), with an index; one file when all fits.

    read: gives the values of a tensor; it is asked once for each, just before they are written. Wide types stand first
    in a file, so that all are aligned. directory: None writes nothing and asks for the same tensors.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    for shard in shards:
        shard.sort(key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        if directory:
            _write_file(directory / name, shard, read)
        else:
            for tensor in shard:
                read(tensor)
    if directory and len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard)},
            "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: pathlib.Path, planned: list[Planned], read: Callable[[Planned], np.ndarray]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in planned:
            array = read(tensor)
            if array.dtype != DTYPES[tensor.dtype] or array.shape != tensor.shape:
                raise ValueError(f"{tensor} was promised, but it came as {array.dtype} of shape {array.shape}.")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
