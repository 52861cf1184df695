"""Read quantized checkpoints as floats where that is exact; refuse others by their method's name.

The tensors decide. A `quantization_config` with plain weights is left over from another save; it is
ignored, and not copied. bitsandbytes' 4 and 8 bits and FP8 in blocks become floats when a tensor is
read. Any other method is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vlmport.checkpoint.lazy_tensor import DerivedTensor
from vlmport.checkpoint.model_card import base_model
from vlmport.checkpoint.names import is_buffer
from vlmport.checkpoint.safetensors_file import StoredTensor
from vlmport.errors import WeightError, some_names

__all__ = ["Dequantized", "dequantized", "without_quantization"]

Tensors = Mapping[str, StoredTensor]
Json = TypeVar("Json")

# The keys in configs: transformers, old compressed-tensors, MLX.
KEYS = ("quantization_config", "compression_config", "quantization")
NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
}
# Last part of a name that only parts of quantized weights have → the methods that write it.
SIGNS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "W_q": "HQQ",
    "_data": "Quanto",
    "weight_qdata": "torchao",
    "weight_blocks": "MXFP4",
    "scales": "GPTQ, AWQ or MLX",
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
NO_WEIGHTS = frozenset({"BOOL", "I64", "U64"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
BLOCK = (128, 128)  # transformers 5.23, FineGrainedFP8Config
ROUNDED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INT8_STEP = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it


def without_quantization(config: Json) -> Json:
    """Remove the quantization settings from a config, at any depth."""
    if isinstance(config, dict):
        kept = {key: without_quantization(value) for key, value in config.items()}
        return {key: value for key, value in kept.items() if key not in KEYS}  # type: ignore[return-value]
    return config


@dataclass(frozen=True)
class Dequantized(DerivedTensor):
    """A weight that becomes floats when it is read.

    Attributes:
        base: the integers or 8-bit floats.
        floats: makes the values, in float32.
    """

    base: StoredTensor
    shape: tuple[int, ...]
    floats: Callable[[], npt.NDArray[np.float32]]

    def numpy(self) -> npt.NDArray[np.float32]:
        """Compute its values in a new array. Raises WeightError if the sizes don't agree."""
        try:
            return self.floats()
        except (ValueError, IndexError) as error:
            raise _incomplete(self.base, f"its scales don't fit it: {error}") from error


def dequantized(
    stored: Tensors, config: Mapping[str, Any], folder: Path
) -> dict[str, StoredTensor | Dequantized]:
    """Return the tensors; those of bitsandbytes and FP8 are floats, without their scales.

    Args:
        config: the contents of config.json.
        folder: the checkpoint's.

    Raises WeightError if a part of a quantized weight is missing, and for other methods.
    """
    made: dict[str, Dequantized] = {}
    parts: set[str] = set()
    for weight, value, own in (*_four_bits(stored), *_eight_bits(stored), *_float8(stored, config)):
        made[weight] = value
        parts |= own
    rest = {name: one for name, one in stored.items() if name not in parts and name not in made}
    _check_plain(rest, config, folder)
    return {**rest, **made}


def _check_plain(tensors: Tensors, config: Mapping[str, Any], folder: Path) -> None:
    """Raise WeightError if tensors are still quantized."""
    told = _told(config)
    packed = [name for name, tensor in tensors.items() if _is_packed(tensor, told is not None)]
    if not packed:
        return
    guess = next((sign for name in packed if (sign := _sign(name))), None)
    types = sorted({tensors[name].dtype for name in packed} - FLOATS)
    source = base_model(folder)
    raise WeightError(
        f"{folder}: quantized with {told or guess or ', '.join(types)}, which vlmport does not "
        f"read; {len(packed)} tensors are quantized: {some_names(packed, 3)}",
        hint=f"use the original model{f', {source}' if source else ''}; "
        "vlmport quantizes by itself (--precision q8 or q4)",
        code="weights.quantized",
    )


def _is_packed(tensor: StoredTensor, is_told: bool) -> bool:
    """Return whether a tensor belongs to a quantized weight, by its name or its type."""
    if _sign(tensor.name):
        return True
    if tensor.dtype in FLOATS or tensor.dtype in NO_WEIGHTS or is_buffer(tensor.name):
        return False
    return is_told or tensor.name.endswith("weight")


def _told(config: Mapping[str, Any]) -> str | None:
    """Return the method that a config names, such as 'AWQ, 4 bits'; None if it names none."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    found = [(key, one[key]) for one in sections for key in KEYS if isinstance(one.get(key), dict)]
    if not found:
        return None
    key, settings = found[0]
    method = settings.get("quant_method")
    if not isinstance(method, str):
        is_bnb = any(name.startswith(("load_in_", "bnb_")) for name in settings)
        others = {"compression_config": "compressed-tensors", "quantization": "MLX"}
        method = "bitsandbytes" if is_bnb else others.get(key, "an unnamed method")
    bits = settings.get("bits", settings.get("w_bit"))
    return NAMES.get(method, method[:40]) + (f", {bits} bits" if isinstance(bits, int) else "")


def _sign(name: str) -> str | None:
    return SIGNS.get(name.rpartition(".")[2])


Found = Iterator[tuple[str, Dequantized, set[str]]]  # a weight's name, it, all its parts


def _four_bits(stored: Tensors) -> Found:
    """Find the 4-bit weights of bitsandbytes.

    Source: bitsandbytes 0.50, functional.py, QuantState.from_dict and dequantize_4bit.
    """
    for state_name in stored:
        if (found := STATE.fullmatch(state_name)) is None:
            continue
        weight = found[1]
        names = {part: f"{weight}.{part}" for part in ("absmax", "quant_map")}
        state = _state(stored[state_name])
        if "nested_offset" in state:
            names |= {part: f"{weight}.{part}" for part in ("nested_absmax", "nested_quant_map")}
        parts = _all(stored, weight, {**names, "": weight})
        four = _FourBits(parts[""], parts, state)
        yield weight, Dequantized(parts[""], four.shape, four.floats), {state_name, *names.values()}


@dataclass(frozen=True)
class _FourBits:
    packed: StoredTensor
    parts: Tensors
    state: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    def floats(self) -> npt.NDArray[np.float32]:
        size = math.prod(self.shape)
        packed = self.packed.raw().reshape(-1).view(np.uint8)
        if len(packed) != -(-size // 2):
            raise ValueError(f"{len(packed)} bytes for the shape {list(self.shape)}")
        levels = np.empty(2 * len(packed), np.uint8)
        levels[::2], levels[1::2] = packed >> 4, packed & 15
        values = self.parts["quant_map"].numpy()[levels[:size]]
        values *= _spread(self._scales(), self.state["blocksize"], size)
        rounded = values.astype(ROUNDED[self.state["dtype"]])  # as the library gives them
        return rounded.astype(np.float32).reshape(self.shape)

    def _scales(self) -> npt.NDArray[np.float32]:
        """Read one scale per block; in double quantization the scales are 8-bit values too."""
        absmax = self.parts["absmax"]
        if "nested_absmax" not in self.parts:
            return absmax.numpy().reshape(-1)
        levels = absmax.raw().reshape(-1)
        outer = self.parts["nested_absmax"].numpy().reshape(-1)
        outer = _spread(outer, self.state["nested_blocksize"], len(levels))
        scales = self.parts["nested_quant_map"].numpy()[levels] * outer
        return scales + np.float32(self.state["nested_offset"])


def _spread(scales: np.ndarray, block: int, size: int) -> np.ndarray:
    """Repeat the scales for each of `size` values. Raises ValueError for a wrong number of them."""
    if len(scales) != -(-size // block):
        raise ValueError(f"{len(scales)} scales for {size} values in blocks of {block}")
    return np.repeat(scales, min(block, size))[:size]


def _state(tensor: StoredTensor) -> dict[str, Any]:
    """Read the JSON in a tensor of bytes. Raises WeightError."""
    try:
        state = json.loads(tensor.raw().tobytes())
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        if state["dtype"] not in ROUNDED:
            raise ValueError(f"dtype {state['dtype']!r}")
        float(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _incomplete(tensor, f"no state of bitsandbytes: {error!r}"[:200]) from error
    return state


def _eight_bits(stored: Tensors) -> Found:
    """Find the 8-bit weights of bitsandbytes.

    Source: bitsandbytes 0.50, backends/default/ops.py, int8_vectorwise_dequant.
    """
    for scales_name in stored:
        module, dot, last = scales_name.rpartition(".")
        if last != "SCB":
            continue
        weight, form = f"{module}{dot}weight", f"{module}{dot}weight_format"
        parts = _all(stored, weight, {"": weight, "SCB": scales_name})
        base, scales = parts[""], parts["SCB"]
        if base.dtype != "I8":
            raise _incomplete(base, f"it is {base.dtype}, expected I8 because of {scales_name!r}")
        if form in stored and stored[form].raw().any():
            raise _incomplete(base, "it is stored in the order of a GPU's kernel, not row by row")

        def floats(base: StoredTensor = base, scales: StoredTensor = scales) -> np.ndarray:
            values = base.raw().astype(np.float32)
            values *= scales.numpy().reshape(-1, 1)
            values *= INT8_STEP
            return values

        yield weight, Dequantized(base, base.shape, floats), {scales_name, form}


def _float8(stored: Tensors, config: Mapping[str, Any]) -> Found:
    """Find the FP8 weights with scales in blocks.

    Source: transformers 5.23, integrations/finegrained_fp8.py, Fp8Dequantize.
    """
    settings = next((config[key] for key in KEYS if isinstance(config.get(key), dict)), {})
    told = settings.get("weight_block_size")
    sizes = [size for size in told if _is_count(size)] if isinstance(told, list) else []
    expected = (sizes[0], sizes[1]) if len(sizes) == 2 else BLOCK
    for scales_name in stored:
        weight = scales_name.removesuffix("_scale_inv")
        if not scales_name.endswith(".weight_scale_inv") or weight not in stored:
            continue
        base, scales = stored[weight], stored[scales_name]
        if base.dtype not in FLOAT8 or len(base.shape) != 2:
            continue
        block = _block(base, scales, expected)

        def floats(
            base: StoredTensor = base,
            scales: StoredTensor = scales,
            block: tuple[int, int] = block,
        ) -> np.ndarray:
            values = base.raw().astype(np.float32)
            each = scales.raw().astype(np.float32)
            if scales.dtype == "U8":  # an exponent of 2
                each = np.exp2(each - 127)
            each = each.reshape(_grid(scales))
            columns = values.shape[1]
            for number, row in enumerate(each):
                part = slice(number * block[0], (number + 1) * block[0])
                values[part] *= _spread(row, block[1], columns)
            return values

        module = weight.removesuffix("weight")
        own = {scales_name, f"{module}activation_scale", f"{module}input_scale"}
        yield weight, Dequantized(base, base.shape, floats), own


def _block(base: StoredTensor, scales: StoredTensor, told: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns share a scale: from the config, else from the shapes.

    Raises WeightError if the scales fit neither.
    """
    sides = (base.shape[0], base.shape[1])
    grid = _grid(scales)
    if tuple(-(-side // size) for side, size in zip(sides, told, strict=True)) == grid:
        return told
    if any(not count or side % count for side, count in zip(sides, grid, strict=True)):
        what = f"{list(base.shape)} in blocks of {list(told)}, its scales are {list(scales.shape)}"
        raise _incomplete(base, what)
    return sides[0] // grid[0], sides[1] // grid[1]


def _grid(scales: StoredTensor) -> tuple[int, ...]:
    return scales.shape if len(scales.shape) == 2 else (1, 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _all(stored: Tensors, weight: str, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Find the parts of a quantized weight. Raises WeightError for missing ones."""
    if missing := [name for name in names.values() if name not in stored]:
        raise WeightError(
            f"{weight!r} is quantized by bitsandbytes, and parts of it are missing: "
            f"{some_names(missing)}",
            hint="the file is incomplete; save the model again",
            code="weights.quantized-incomplete",
        )
    return {part: stored[name] for part, name in names.items()}


def _incomplete(tensor: StoredTensor, what: str) -> WeightError:
    return WeightError(
        f"{tensor.file}: {tensor.name!r}: quantized, and {what}",
        hint="the file is damaged, or of another version; use the original model",
        code="weights.quantized-incomplete",
    )
