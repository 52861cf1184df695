"""The layouts by name: forms of folder that an export can be written in.

`hub` is the one that the runtime and the browser run. The others are for programs that expect
certain files; `vlmport verify` proves them like it.
"""

from __future__ import annotations

from collections.abc import Mapping

HUB = "hub"
COMPONENTS = "components"

# Layout → the components that it can't be without.
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    HUB: ("image_processor", "vision_encoder", "embed_tokens", "decoder_model_merged"),
    COMPONENTS: (
        "image_processor",
        "vision_encoder",
        "projection",
        "prefix_init",
        "language_model",
    ),
}
