"""The reference of Idefics3 and SmolVLM: Hugging Face's own model, tokenizer, processor on Pillow.

SmolVLM has Idefics3's processor too: both write one prompt, and SmolVLM's class needs packages for
videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image

from vlmport.parity.asked import Request
from vlmport.parity.pictures import Picture, drawn_pictures
from vlmport.parity.reference_errors import in_one_line
from vlmport.parity.references.base import PretrainedReference, user_message
from vlmport.parity.references.loading import quietly

if TYPE_CHECKING:
    from jaxtyping import Float

# Sizes of images in addition to the ladder's own: one row of tiles; the smallest image.
SIZES = ((1300, 60), (1, 1))
CAPTION = "Can you describe this image?"
QUESTION = "What is in the picture, and where?"
WHOLE = {"do_image_splitting": False}


@in_one_line
class Idefics3Reference(PretrainedReference):
    """A checkpoint of either model type."""

    def _processor_class(self, config: Mapping[str, Any]) -> Any:
        return transformers.Idefics3Processor

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """Ask about each image split and whole, about two in one prompt, and about none."""
        pictures = [*pictures, *drawn_pictures(SIZES)]
        asked = user_message(CAPTION, 1)
        requests = [Request(one.name, (one,), asked, is_caption=True) for one in pictures]
        question = user_message(QUESTION, 1)
        requests += [
            Request(f"{one.name} whole", (one,), question, options=WHOLE) for one in pictures
        ]
        again = (
            *user_message(QUESTION, 2),
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
            *user_message("Which is larger?", 0),
        )
        requests.append(Request("two pictures", tuple(pictures[1:3]), again, options=WHOLE))
        requests.append(
            Request("two pictures split", tuple(pictures[1:3]), user_message(QUESTION, 2))
        )
        return [*requests, Request("text alone", (), user_message("Why is the sky blue?", 0))]

    def pixels(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Make pixel_values float32 [1, n, 3, t, t] and pixel_attention_mask bool [1, n, t, t]."""
        made = self._process(self.processor.image_token, [image], options or {})
        mask = made["pixel_attention_mask"].astype(bool)
        return {"pixel_values": made["pixel_values"], "pixel_attention_mask": mask}

    def _process(
        self, text: str, images: Sequence[Image.Image], options: Mapping[str, Any]
    ) -> Mapping[str, np.ndarray]:
        """Add nothing to the text: the template has all that a prompt begins with."""
        pictures = {"images": [list(images)], **options} if images else {}
        return self.processor(text=text, return_tensors="np", add_special_tokens=False, **pictures)

    @quietly
    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """Run tower and connector over all tiles at once."""
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        return torch.cat(self.model.get_image_features(**tensors).pooler_output).numpy()


REFERENCE = Idefics3Reference
