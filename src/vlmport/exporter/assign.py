"""Assign a tensor of the checkpoint to every weight of the graphs, to all of them or none."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from vlmport.checkpoint import LazyTensor
from vlmport.errors import OptionError, WeightError, did_you_mean, some_names
from vlmport.graph.parameters import Source, Weight

PAST_FLOAT16 = "weights.past-float16"
OnBytes = Callable[[int], None]


@dataclass
class Assignment:
    """The tensors that fit and those that don't, over all graphs of an export.

    Attributes:
        tensors: the checkpoint, by name.
        used: names that a graph reads; `read` has the ids of their tensors.
        missing: names that the checkpoint lacks.
        misshapen: name → message.
        wanted: names that a graph needs.
        ignored: names that `ignore` leaves out.
    """

    tensors: Mapping[str, LazyTensor]
    used: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    misshapen: dict[str, str] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    read: set[int] = field(default_factory=set)

    def assign(self, graph: ir.Graph, on_bytes: OnBytes) -> None:
        """Point each Weight of a graph at its tensor; nothing is read until the graph is saved."""
        for value in graph.initializers.values():
            if not isinstance(value, Weight):
                continue
            found = [self._find(*one) for one in zip(value.keys, value.sources, strict=True)]
            tensors = [tensor for tensor in found if tensor is not None]
            if len(tensors) == len(found):
                value.const_value = _lazy(value, tensors, on_bytes)

    def _find(self, key: str, source: Source) -> LazyTensor | None:
        """Find the tensor of that name and shape; if there is none, note it and return None."""
        self.wanted.add(key)
        tensor = self.tensors.get(key)
        if tensor is None:
            self.missing.add(key)
        elif tuple(tensor.shape) != source.shape:
            shapes = f"{list(tensor.shape)}, expected {list(source.shape)}"
            self.misshapen[key] = f"{key!r} {shapes}"
        else:
            self.used.add(key)
            self.read.add(id(tensor))
            return tensor
        return None

    def finish(self, is_unused: Callable[[str], bool]) -> None:
        """Raise WeightError unless every weight was found, fits, and every tensor was used."""
        surplus = [
            key
            for key in self.tensors
            if not (self._is_needed(key) or key in self.ignored or is_unused(key))
        ]
        parts = []
        if self.missing:
            parts.append(
                f"{len(self.missing)} of {len(self.wanted)} weights unset: "
                f"{_listed(self.missing, lambda key: repr(key) + did_you_mean(key, surplus))}"
            )
        if self.misshapen:
            parts.append(
                f"{len(self.misshapen)} of {len(self.wanted)} weights have another shape: "
                f"{_listed(self.misshapen, self.misshapen.__getitem__)}"
            )
        if surplus:
            parts.append(
                f"{len(surplus)} tensors are left over, no graph reads them: {some_names(surplus)}"
            )
        if parts:
            raise WeightError("; ".join(parts), hint=self._hint(surplus), code=self._code)

    @property
    def _code(self) -> str:
        if self.missing:
            return "weights.unset"
        return "weights.misshapen" if self.misshapen else "weights.surplus"

    def _hint(self, surplus: list[str]) -> str:
        if any(key.endswith("lm_head.weight") for key in self.missing):
            return "if the head is tied to the embedding, set tie_word_embeddings in config.json"
        if surplus and not self.missing and not self.misshapen:
            return (
                "check that config.json belongs to these weights; `vlmport export --ignore-weights "
                "GLOB` leaves out tensors that the model does not need"
            )
        return "check that config.json belongs to these weights"

    def ignore(self, patterns: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Leave out the tensors whose name, in the file or in the graphs, matches a pattern.

        Call it when all graphs are assigned. Returns pattern → the names in the file.

        Raises OptionError for a pattern that matches nothing, or a tensor that a graph needs.
        """
        ignored: dict[str, tuple[str, ...]] = {}
        for pattern in dict.fromkeys(patterns):
            keys = [key for key, tensor in self.tensors.items() if _matches(pattern, key, tensor)]
            if not keys:
                raise OptionError(
                    f"--ignore-weights {pattern!r} matches none of {len(self.tensors)} tensors",
                    hint="* matches any text: 'model.talker.*' matches every name that begins with "
                    "'model.talker.'",
                    code="option.ignores-nothing",
                )
            if needed := [key for key in keys if self._is_needed(key)]:
                raise OptionError(
                    f"--ignore-weights {pattern!r} matches {len(needed)} tensors that the model "
                    f"needs: {some_names(needed)}",
                    hint="match only tensors that are left over in an export without this option",
                    code="option.ignores-needed-weights",
                )
            ignored[pattern] = tuple(sorted({self.tensors[key].name for key in keys}))
            self.ignored.update(keys)
        return ignored

    def _is_needed(self, key: str) -> bool:
        # A tied matrix has two names, and may be read under either.
        return key in self.wanted or id(self.tensors[key]) in self.read


def _matches(pattern: str, key: str, tensor: LazyTensor) -> bool:
    return fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(tensor.name, pattern)


def _listed(names: Iterable[str], message: Callable[[str], str], limit: int = 8) -> str:
    """Join the messages of the first `limit` names; only count the rest, which costs nothing."""
    ordered = sorted(names)
    rest = f", … and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(message(name) for name in ordered[:limit]) + rest


def _lazy(weight: Weight, tensors: Sequence[LazyTensor], on_bytes: OnBytes) -> ir.LazyTensor:
    """Make the initializer's data, computed when it is written and not kept."""

    def make() -> ir.Tensor:
        assert weight.dtype is not None
        assert weight.shape is not None
        parts = []
        for tensor, source in zip(tensors, weight.sources, strict=True):
            part = source.convert(functools.partial(_load, tensor))
            parts.append(_rounded(part, weight.dtype, tensor.name))
        array = np.concatenate(parts, axis=weight.axis) if len(parts) > 1 else parts[0]
        assert array.shape == tuple(weight.shape), (weight.name, array.shape)
        on_bytes(array.nbytes)
        return ir.Tensor(np.ascontiguousarray(array), name=weight.name)

    assert weight.dtype is not None
    assert weight.shape is not None
    return ir.LazyTensor(make, dtype=weight.dtype, shape=ir.Shape(weight.shape), name=weight.name)


def _load(tensor: LazyTensor) -> np.ndarray:
    array = tensor.numpy()
    if not np.isfinite(array).all():
        raise WeightError(
            f"{tensor.name!r} holds NaN or infinity",
            hint="the training diverged or the file is damaged; nothing was exported",
            code="weights.not-finite",
        )
    return array


def _rounded(array: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """Round the values to the stored type. Raises WeightError if float16 can't hold them."""
    if array.dtype == dtype.numpy():
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype.numpy())
    if not np.isfinite(rounded).all():
        raise WeightError(
            f"{name!r} holds {float(np.abs(array).max()):.3g}, more than float16 can hold",
            hint="export this model as fp32, q8 or q4",
            code=PAST_FLOAT16,
        )
    return rounded
