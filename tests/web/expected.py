"""What Python's runtime gives, for the browser to give the same (web/browser/support.ts)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vlmport.bundle import Bundle
from vlmport.runtime.images import open_image
from vlmport.runtime.model import VLM

EXAMPLES = Path(__file__).parents[2] / "examples"
CUT = ("rgb.png", "subsampled.jpg", "tall.png")  # pictures with other numbers of tiles


def captions_of_tiles(bundle: Bundle, pictures: list[Path]) -> dict[str, dict[str, Any]]:
    found = {}
    with VLM.open(bundle, precision="fp32") as vlm:
        for path in pictures:
            caption = vlm.caption(path, max_new_tokens=12)
            inputs = vlm.components.process_image(open_image(path)).inputs
            found[path.name] = {
                "tokens": caption.token_ids,
                "text": caption.text,
                "count": inputs["pixel_values"].shape[1],
                "imageTokens": caption.counts["image_tokens"],
            }
    return found


def expectations(bundle: Bundle, tiles: Bundle, kinds: list[Path]) -> dict[str, Any]:
    """Captions of the examples, and what the image processor and the decoders of images make."""
    captions: dict[str, dict[str, Any]] = {path.name: {} for path in sorted(EXAMPLES.glob("*.png"))}
    for precision in bundle.manifest.precisions:
        with VLM.open(bundle, precision=precision) as vlm:
            for name, found in captions.items():
                caption = vlm.caption(EXAMPLES / name)
                found[precision] = {"tokens": caption.token_ids, "text": caption.text}
    with VLM.open(bundle, precision="fp32") as vlm:
        rgb = open_image(EXAMPLES / next(iter(captions)))
        (values,) = vlm.components.process_image(rgb).inputs.values()
    pixels = {}
    for path in kinds:
        rgb = open_image(path)
        height, width, _ = rgb.shape
        digest = hashlib.sha256(rgb.tobytes()).hexdigest()
        pixels[path.name] = {"width": width, "height": height, "sha256": digest}
    return {
        "precisions": bundle.manifest.precisions,
        "captions": captions,
        "pixels": pixels,
        "tiles": captions_of_tiles(tiles, [path for path in kinds if path.name in CUT]),
        "pixelValues": {"dims": values.shape, "data": values.ravel().tolist()},
    }
