"""Read the decoder's inputs and outputs: the pairs of cache tensors, and their sizes."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import onnxruntime as ort

from vlmport.bundle import CacheLayout
from vlmport.errors import BundleError, quoted
from vlmport.runtime.graphs.devices import CPU
from vlmport.runtime.graphs.sessions import DTYPES

# More than any model has: memory of the sizes in a graph is allocated before it runs.
MAX_HEADS, MAX_VOCABULARY = 1 << 14, 1 << 24


@dataclass(frozen=True)
class CachePort:
    """One cache tensor: its input, its output, and the sizes that never change."""

    past: str
    present: str
    heads: int
    head_dim: int
    dtype: np.dtype

    def empty(self, rows: int, capacity: int = 0) -> np.ndarray:
        """Zeros [rows, K, capacity, head_dim]."""
        return np.zeros((rows, self.heads, capacity, self.head_dim), self.dtype)


@dataclass(frozen=True)
class Decoder:
    """The decoder's session and what its inputs and outputs are."""

    session: ort.InferenceSession
    ports: tuple[CachePort, ...]
    inputs: frozenset[str]
    vocab_size: int
    logits_dtype: np.dtype
    positions_rank: int  # 2: [B, S]; 3: [3, B, S], positions in time, height and width
    row_by_row: bool = False  # step rows one by one: a row's logits would depend on the other rows

    @property
    def on_host(self) -> bool:
        """Whether it runs on the CPU."""
        return self.session.get_providers()[0] == CPU

    @property
    def token_bytes(self) -> int:
        """Size of a token's keys and values in the cache."""
        return sum(port.heads * port.head_dim * port.dtype.itemsize for port in self.ports)

    @property
    def rounds_by_call(self) -> bool:
        """Whether a token's numbers depend on the other tokens of its call.

        Activations are scaled by call, or float16 rounds otherwise in another call. In other
        decoders a token has the same numbers in every call, unless it is alone in a tile of the
        attention (`attention_tile`).
        """
        return self.row_by_row or any(port.dtype == np.float16 for port in self.ports)

    @property
    def attention_tile(self) -> int:
        """A divisor of the number of tokens that attention computes together.

        The last of n tokens is alone in its tile where n % attention_tile may be 1. ONNX Runtime
        multiplies a single row by other code, whose last bits differ. Its tiles have 2 * head_dim
        tokens, or a smaller power of two where the processor's L2 cache is small.
        Source: onnxruntime 1.31, gqa_attention_base.h (flash attention on the CPU).
        """
        return 16 if any(2 * port.head_dim % 32 for port in self.ports) else 32

    @classmethod
    def of(
        cls,
        session: ort.InferenceSession,
        layout: CacheLayout,
        where: str,
        *,
        row_by_row: bool = False,
    ) -> Decoder:
        """Pair cache inputs and outputs by name. Raises BundleError where one has no partner."""
        inputs = {one.name: one for one in session.get_inputs()}
        outputs = {one.name: one for one in session.get_outputs()}
        unknown = [name for name in ("inputs_embeds", "attention_mask") if name not in inputs]
        if unknown or "logits" not in outputs:
            raise BundleError(
                f"{where}: no {unknown[0] if unknown else 'logits'}; it has "
                f"{', '.join(inputs)} → {', '.join(outputs)}",
                hint="export the bundle again",
                code="bundle.wrong-graph",
            )
        logits = outputs["logits"]
        shape = logits.shape or [None]
        if not _is_size(shape[-1], MAX_VOCABULARY):
            raise BundleError(
                f"{where}: logits have shape {quoted(logits.shape)}, expected a fixed size of at "
                f"most {MAX_VOCABULARY} at the end",
                hint="export the bundle again",
                code="bundle.wrong-shape",
            )
        positions = inputs.get("position_ids")
        return cls(
            session,
            _pair_cache(inputs, outputs, layout, where),
            frozenset(inputs),
            logits.shape[-1],
            _dtype(logits, where),
            len(positions.shape) if positions else 2,
            row_by_row,
        )


def scales_by_call(path: Path) -> bool:
    """Whether a graph rounds activations by one scale for all rows of a call (8-bit ones do).

    The operator's name is searched in the file's bytes; parsing the graph would need `onnx`.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
        return graph.find(b"DynamicQuantizeLinear") >= 0


def _pair_cache(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], layout: CacheLayout, where: str
) -> tuple[CachePort, ...]:
    pasts = [name for name in inputs if name.startswith(layout.past)]
    presents = {name for name in outputs if name.startswith(layout.present)}
    partner = {name: layout.present + name.removeprefix(layout.past) for name in pasts}
    lonely = [name for name in pasts if partner[name] not in presents]
    lonely += sorted(presents - set(partner.values()))
    if lonely or not pasts:
        named = ", ".join(lonely[:4]) or f"nothing begins with {layout.past!r}"
        raise BundleError(
            f"{where}: cache tensors without a partner: {named}",
            hint="export the bundle again",
            code="bundle.wrong-graph",
        )
    ports = []
    for name in pasts:
        shape = inputs[name].shape or []
        heads, head_dim = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
        if not (_is_size(heads, MAX_HEADS) and _is_size(head_dim, MAX_HEADS)):
            raise BundleError(
                f"{where}: {name} has shape {quoted(shape)}, expected four sizes, of which 1 and 3 "
                f"are fixed and at most {MAX_HEADS}",
                hint="export the bundle again",
                code="bundle.wrong-shape",
            )
        dtype = _dtype(inputs[name], where)
        ports.append(CachePort(name, partner[name], heads, head_dim, dtype))
    return tuple(ports)


def _is_size(value: Any, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and 1 <= value <= most


def _dtype(value: Any, where: str) -> np.dtype:
    """The numpy type of an input or output."""
    if value.type not in DTYPES:
        raise BundleError(
            f"{where}: {value.name} is {value.type}, a type that numpy lacks",
            hint="export the bundle in another precision",
            code="bundle.wrong-graph",
        )
    return DTYPES[value.type]
