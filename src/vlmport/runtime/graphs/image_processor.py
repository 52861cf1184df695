"""Run the image processor's graph: an image and options in, the vision encoder's inputs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from vlmport.errors import BundleError, DeviceError, ImageError, OptionError, did_you_mean, quoted
from vlmport.runtime.graphs.base import IMAGE
from vlmport.runtime.graphs.sessions import (
    DTYPES,
    ORT_ERRORS,
    first_line,
    is_out_of_memory,
    refusal,
)

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt8

VISION = "vision_encoder"
KINDS = {
    "b": "b",
    "i": "iu",
    "u": "iu",
    "f": "iuf",
}  # kind of an input's dtype → kinds of values that it takes


@dataclass(frozen=True)
class ProcessedImage:
    """The image processor's outputs for one image.

    Attributes:
        inputs: the vision encoder's inputs by name.
        prompt_ids: the token ids that a prompt contains for the image.
    """

    inputs: dict[str, np.ndarray]
    prompt_ids: Int64[np.ndarray, " T"]


def process_image(
    session: ort.InferenceSession, rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any]
) -> ProcessedImage:
    """Run an image processor on one image. Raises as `Components.process_image` does."""
    feeds = {"image": np.ascontiguousarray(rgb), **option_feeds(session, options)}
    try:
        values = session.run(None, feeds)
    except ORT_ERRORS as error:
        if is_out_of_memory(error):
            raise out_of_memory(IMAGE, error) from error
        reason, hint = refusal(error) or (
            first_line(error),
            "check that the image is not extremely narrow",
        )
        raise ImageError(
            f"an image of {rgb.shape[1]}x{rgb.shape[0]} pixels can't be processed: {reason}",
            hint=hint,
            code="image.refused",
        ) from error
    outputs = dict(zip((one.name for one in session.get_outputs()), values, strict=True))
    if "prompt_ids" not in outputs:
        raise BundleError(
            f"{IMAGE}: no output 'prompt_ids'; it has {', '.join(outputs)}",
            hint="export the bundle again",
            code="bundle.wrong-graph",
        )
    prompt_ids = np.asarray(outputs.pop("prompt_ids"), np.int64).reshape(-1)
    return ProcessedImage({name: np.asarray(value) for name, value in outputs.items()}, prompt_ids)


def option_feeds(
    session: ort.InferenceSession, options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Convert options to arrays. The options of a graph are its overridable initializers and its
    inputs other than `image`."""
    declared: Sequence[Any] = [*session.get_inputs(), *session.get_overridable_initializers()]
    known = {one.name: one for one in declared if one.name != "image"}
    feeds = {}
    for name, value in options.items():
        if name not in known:
            raise OptionError(
                f"this bundle has no image option {quoted(name)}{did_you_mean(name, known)}",
                hint=f"its image options: {', '.join(known) or 'none'}",
                code="option.unknown",
            )
        dtype = DTYPES[known[name].type]
        try:
            given = np.asarray(value)
        except ValueError:  # lists of unequal lengths
            given = np.asarray(None)
        if given.dtype.kind not in KINDS[dtype.kind]:  # numpy would convert "no" to true
            raise OptionError(
                f"image option {name}={quoted(value)}: expected {known[name].type}",
                hint="in JSON: true, false, 5, 0.5 or [5, 7]",
                code="option.wrong-value",
            )
        feeds[name] = given.astype(dtype)
    return feeds


def out_of_memory(component: str, error: Exception) -> ImageError | DeviceError:
    """Make the error for an image or a prompt that needs more memory than there is."""
    detail = first_line(error) or type(error).__name__
    if component in (IMAGE, VISION):
        return ImageError(
            f"not enough memory for this image ({component}: {detail})",
            hint="scale it down, set image options that scale it down, or free memory",
            code="image.out-of-memory",
        )
    return DeviceError(
        f"not enough memory ({component}: {detail})",
        hint="use a smaller batch, fewer or smaller images, or a shorter prompt",
        code="device.out-of-memory",
    )
