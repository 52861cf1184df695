"""Open safetensors files as lazy tensors.

Opening a checkpoint reads headers only; `numpy()` reads one tensor. No file stays open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlmport.checkpoint.lazy_tensor import LazyTensor
from vlmport.checkpoint.names import canonical_names, is_buffer
from vlmport.checkpoint.quantized import dequantized
from vlmport.checkpoint.safetensors_file import DOWNLOAD_AGAIN, StoredTensor
from vlmport.errors import WeightError, some_names
from vlmport.files.foreign import check_file
from vlmport.files.json_files import load_json

__all__ = ["LazyTensor", "StoredTensor", "Weights", "open_safetensors"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERT = "convert it: save_pretrained(folder, safe_serialization=True) in transformers"


class Weights(Mapping[str, LazyTensor]):
    """The weights of a checkpoint by plain name, without LoRA pairs and stored buffers.

    Attributes:
        pairs: plain name of an adapted weight → its lora_A [r, in] and lora_B [out, r]. The
            weight of that name in the mapping itself is the base, without the adapter.
        where: what to call them in errors.
    """

    def __init__(self, stored: Mapping[str, LazyTensor], where: str = "weights"):
        """Sort stored tensors. Raises WeightError and AdapterError as `canonical_names` does."""
        names = canonical_names((name for name in stored if not is_buffer(name)), where)
        self.where = where
        self._tensors = {plain: stored[name] for plain, name in names.plain.items()}
        self.pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {
            plain: (stored[a], stored[b]) for plain, (a, b) in names.pairs.items()
        }

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any] | None = None) -> Weights:
        """Read the headers of model.safetensors, or of the shards in its index.

        Args:
            config: config.json, which says how quantized weights are to be read.

        Raises WeightError when files are missing, damaged, pickled, or disagree with the index.
        """
        single, index = folder / SINGLE, folder / INDEX
        if single.exists() or single.is_symlink():  # a link into a cache that lost the file
            stored = open_safetensors(single)
        elif index.exists() or index.is_symlink():
            stored = _open_shards(index)
        else:
            raise _no_weights(folder)
        return cls(dequantized(stored, config or {}, folder), str(folder))

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Map stored name → tensor of one file; no data is read.

    Raises WeightError when the file is missing, no safetensors, or cut short.
    """
    check_file(file, WeightError, hint=DOWNLOAD_AGAIN, what="the weights themselves")
    try:
        with safe_open(file, framework="np"):
            pass  # the library checks the header: offsets, sizes, overlaps, the file's length
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as cause:
        if not file.stat().st_size:
            raise WeightError(
                f"{file}: empty (0 bytes)", hint=DOWNLOAD_AGAIN, code="weights.unreadable"
            ) from cause
        what = f"not readable as safetensors: {str(cause)[:300]}"
        raise WeightError(
            f"{file}: {what}", hint=DOWNLOAD_AGAIN, code="weights.unreadable"
        ) from cause
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        tensors[name] = StoredTensor(name, shape, dtype, file, 8 + length + start, end - start)
    return tensors


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    """Open the tensors of all shards, and check that the index agrees with them."""
    weight_map = load_json(index, error=WeightError, hint=DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{index}: no weight_map", hint=DOWNLOAD_AGAIN, code="weights.bad-index")
    odd = {str(file) for file in weight_map.values() if not _is_plain_file(file)}
    if odd:
        hint = "shards must be in the folder of their index; don't use this checkpoint"
        raise WeightError(
            f"{index}: not file names of shards: {some_names(odd)}",
            hint=hint,
            code="weights.bad-index",
        )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (index.parent / file).exists()]
    if missing:
        what = f"{len(missing)} of {len(files)} shards missing: {some_names(missing)}"
        raise WeightError(
            f"{index.parent}: {what}", hint="download them again", code="weights.missing-file"
        )
    shards = {file: open_safetensors(index.parent / file) for file in files}
    _check_index(index, weight_map, shards)
    return {name: shards[file][name] for name, file in weight_map.items()}


def _is_plain_file(file: object) -> bool:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    return not any(char in file for char in "/\\:\0") and not file.startswith(".")


def _check_index(
    index: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, LazyTensor]]
) -> None:
    lost = [f"{name} in {file}" for name, file in weight_map.items() if name not in shards[file]]
    extra = [
        f"{name} in {file}"
        for file, tensors in shards.items()
        for name in tensors
        if weight_map.get(name) != file
    ]
    problems = []
    if lost:
        problems.append(f"not where the index says: {some_names(lost)}")
    if extra:
        problems.append(f"not in the index: {some_names(extra)}")
    if problems:
        hint = "index and shards are of different saves; download all of them again"
        raise WeightError(
            f"{index}: {len(lost) + len(extra)} tensors " + "; ".join(problems),
            hint=hint,
            code="weights.bad-index",
        )


def _no_weights(folder: Path) -> WeightError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    other = [n for n in names if n.endswith((".safetensors", ".gguf", ".onnx", ".msgpack", ".h5"))]
    if pickled:
        return WeightError(
            f"{folder}: only pickled weights ({some_names(pickled)}), expected {SINGLE}",
            hint=CONVERT,
            code="weights.pickled",
        )
    found = f"found {some_names(other)}" if other else "found no weights"
    return WeightError(
        f"{folder}: expected {SINGLE} or {INDEX}, {found}",
        hint=f"download the weights again; if they have another format, {CONVERT}",
        code="weights.missing-file",
    )
