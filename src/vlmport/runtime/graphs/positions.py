"""Compute the positions of a prompt's tokens, by the bundle's own graph.

The graph's inputs say what it needs: the ids, their mask, and any outputs of the image processor
with the same names. Nothing here knows the meaning of the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from vlmport.errors import BundleError, PromptError, VlmportError
from vlmport.runtime.graphs.sessions import DTYPES, ORT_ERRORS, first_line, refusal

if TYPE_CHECKING:
    from jaxtyping import Int, Int64

IDS, MASK = "input_ids", "attention_mask"
OUTPUTS = ("position_ids", "rope_delta")
AGAIN = "export the bundle again"


@dataclass(frozen=True)
class Positions:
    """The positions of a prompt's tokens, and of the tokens after them.

    Attributes:
        ids: one position for each token, or one on each of three axes.
        rope_delta: the next position minus the number of tokens.
    """

    ids: Int64[np.ndarray, "... S"]
    rope_delta: int = 0


def counted(ids: Int[np.ndarray, " S"]) -> Positions:
    """Return 0, 1, …, for a bundle without a graph of positions."""
    return Positions(np.arange(len(ids), dtype=np.int64))


def image_inputs(session: ort.InferenceSession) -> dict[str, Any]:
    """Return the graph's inputs that the image processor makes, by name."""
    return {one.name: one for one in session.get_inputs() if one.name not in (IDS, MASK)}


def computed(
    session: ort.InferenceSession,
    ids: Int[np.ndarray, " S"],
    images: Sequence[Mapping[str, np.ndarray]],
    where: str,
) -> Positions:
    """Run the graph of positions for a prompt and the image processor's outputs of its images.

    Args:
        where: the name of the graph, for errors.

    Raises BundleError for an input that the image processor does not make or wrong outputs,
    PromptError where the graph refuses the images.
    """
    feeds: dict[str, np.ndarray] = {
        IDS: np.ascontiguousarray(ids[None], np.int64),
        MASK: np.ones((1, len(ids)), np.int64),
    }
    inputs = {one.name for one in session.get_inputs()}
    feeds = {name: value for name, value in feeds.items() if name in inputs}
    for name, one in image_inputs(session).items():
        feeds[name] = _joined(one, images, where)
    absent = [name for name in OUTPUTS if name not in {one.name for one in session.get_outputs()}]
    if absent:
        raise BundleError(
            f"{where}: no output {absent[0]!r}", hint=AGAIN, code="bundle.wrong-graph"
        )
    try:
        positions, delta = (np.asarray(value) for value in session.run(OUTPUTS, feeds))
    except ORT_ERRORS as error:
        raise _failed(error, where) from error
    if positions.ndim not in (2, 3) or positions.shape[-2:] != (1, len(ids)) or delta.size != 1:
        raise BundleError(
            f"{where}: positions {list(positions.shape)} and rope_delta {list(delta.shape)} for "
            f"{len(ids)} tokens",
            hint=AGAIN,
            code="bundle.wrong-graph",
        )
    return Positions(positions[..., 0, :].astype(np.int64, copy=False), int(delta.reshape(())))


def _joined(one: Any, images: Sequence[Mapping[str, np.ndarray]], where: str) -> np.ndarray:
    """Concatenate an input for all images along axis 0, which is 0 without images."""
    if any(one.name not in image for image in images):
        raise BundleError(
            f"{where}: input {one.name!r} is not made by the image processor",
            hint=AGAIN,
            code="bundle.wrong-graph",
        )
    dtype, rest = DTYPES.get(one.type), one.shape[1:]
    none = np.zeros((0, *(size if isinstance(size, int) else 0 for size in rest)), dtype)
    values = [image[one.name] for image in images]
    like = [(value.dtype, value.ndim, value.shape[1:]) for value in values]
    if odd := [
        value
        for value, kind in zip(values, like, strict=True)
        if kind != (dtype, none.ndim, values[0].shape[1:])
    ]:
        raise BundleError(
            f"{where}: input {one.name!r} is {one.type} {one.shape}, the image processor makes "
            f"{odd[0].dtype} {list(odd[0].shape)}",
            hint=AGAIN,
            code="bundle.wrong-graph",
        )
    return np.concatenate(values) if values else none


def _failed(error: Exception, where: str) -> VlmportError:
    if told := refusal(error):
        return PromptError(f"{where}: {told[0]}", hint=told[1], code="prompt.refused")
    return BundleError(
        f"{where} failed: {first_line(error)}",
        hint="download or export the bundle again",
        code="graph.run-failed",
    )
