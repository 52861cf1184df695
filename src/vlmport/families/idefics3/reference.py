"""Idefics3's and SmolVLM's truth: Hugging Face's own model, processor on Pillow and tokenizer.

SmolVLM has Idefics3's processor too: both write one prompt, and SmolVLM's class needs packages for
videos.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image

from vlmport.errors import PromptError
from vlmport.parity.asked import Message, Request
from vlmport.parity.pictures import Picture, drawn_pictures
from vlmport.parity.protocol import Generated
from vlmport.parity.reference_errors import in_one_line
from vlmport.parity.references.adapter_files import (
    with_adapter_generation,
    with_adapter_processor,
)
from vlmport.parity.references.adapters import add_adapter
from vlmport.parity.references.loading import (
    DECODER_DIMS,
    config_int,
    generated,
    prompt_text,
    quietly,
    useful_threads,
    versions,
)
from vlmport.parity.references.pretrained import (
    answer_stop_ids,
    forget_options,
    load_model,
    load_processor,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SIZES = ((1300, 60), (1, 1))  # of pictures beside the ladder's own: one row of tiles, all there is
CAPTION = "Can you describe this image?"
QUESTION = "What is in the picture, and where?"
WHOLE = {"do_image_splitting": False}


@in_one_line
class Idefics3Reference:
    """A checkpoint of either model type."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        image_token_id: int,
        adapter: str | Path | None = None,
        ignored: Collection[str] = (),
    ):
        model = load_model(folder, ignored)
        if adapter is not None:
            add_adapter(model, Path(adapter))
        self.model = model.eval().requires_grad_(False)
        self.threads = useful_threads(sum(weight.numel() for weight in model.parameters()))
        self.image_token_id = model.config.image_token_id
        files = None if adapter is None else Path(adapter)
        with_adapter_generation(model, files)
        kind = transformers.Idefics3Processor
        self.processor = with_adapter_processor(
            lambda path: load_processor(path, kind), folder, files
        )
        image = self.processor.image_processor
        self.grey_level = image.rescale_factor / min(image.image_std)
        text: Any = model.config.text_config
        self.stop_token_ids = answer_stop_ids(model, self.processor)
        forget_options(model)
        self.dims: Mapping[str, int] = {name: config_int(text, name) for name in DECODER_DIMS}
        self.versions = versions()

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """Each picture split and whole; two in one prompt, over two turns; text alone."""
        pictures = [*pictures, *drawn_pictures(SIZES)]
        asked = _messages(CAPTION, 1)
        requests = [Request(one.name, (one,), asked, is_caption=True) for one in pictures]
        question = _messages(QUESTION, 1)
        requests += [
            Request(f"{one.name} whole", (one,), question, options=WHOLE) for one in pictures
        ]
        again = (
            *_messages(QUESTION, 2),
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
            *_messages("Which is larger?", 0),
        )
        requests.append(Request("two pictures", tuple(pictures[1:3]), again, options=WHOLE))
        requests.append(Request("two pictures split", tuple(pictures[1:3]), _messages(QUESTION, 2)))
        return [*requests, Request("text alone", (), _messages("Why is the sky blue?", 0))]

    def image_ids(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> Int[np.ndarray, " T"]:
        return self._process(self.processor.image_token, [image], options or {})["input_ids"][0]

    def prompt_ids(self, request: Request) -> Int[np.ndarray, " S"]:
        text = prompt_text(self.processor, request)
        return self._process(text, request.images, request.options)["input_ids"][0]

    def pixels(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """pixel_values float32 [1, n, 3, t, t] and pixel_attention_mask bool [1, n, t, t]."""
        made = self._process(self.processor.image_token, [image], options or {})
        mask = made["pixel_attention_mask"].astype(bool)
        return {"pixel_values": made["pixel_values"], "pixel_attention_mask": mask}

    def _process(
        self, text: str, images: Sequence[Image.Image], options: Mapping[str, Any]
    ) -> Mapping[str, np.ndarray]:
        """Nothing is added to the text: the template holds whatever a prompt begins with."""
        pictures = {"images": [list(images)], **options} if images else {}
        return self.processor(text=text, return_tensors="np", add_special_tokens=False, **pictures)

    @quietly
    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """Tower and connector over all tiles at once."""
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        return torch.cat(self.model.get_image_features(**tensors).pooler_output).numpy()

    @quietly
    def embeds(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T D"]
    ) -> Float[np.ndarray, "S D"]:
        """Raises PromptError unless there are as many image tokens as features."""
        image = np.asarray(ids) == self.image_token_id
        if image.sum() != len(features):
            raise PromptError(
                f"{image.sum()} image tokens in the prompt, {len(features)} features",
                code="prompt.wrong-features",
            )
        embeds = self.model.get_input_embeddings()(torch.from_numpy(np.asarray(ids))).numpy()
        embeds[image] = features
        return embeds

    def position_ids(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Int[np.ndarray, " S"]:
        """0 … S-1, as a llama counts when nobody gives it positions."""
        return np.arange(len(ids), dtype=np.int64)

    @quietly
    def logits(
        self, embeds: Float[np.ndarray, "S D"], position_ids: Int[np.ndarray, " S"]
    ) -> Float[np.ndarray, "S V"]:
        """One causal pass over the whole sequence, without a cache."""
        output = self.model(
            inputs_embeds=torch.from_numpy(embeds)[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            position_ids=torch.from_numpy(position_ids)[None],
            use_cache=False,
        )
        return output.logits[0].numpy()

    @quietly
    def generate(
        self,
        embeds: Float[np.ndarray, "S D"],
        max_new_tokens: int,
        ids: Int[np.ndarray, " S"],
        pictures: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> Generated:
        """`generate(inputs_embeds=…)`, greedy; positions are left to it."""
        return generated(self.model, embeds, max_new_tokens, self.stop_token_ids)


def _messages(text: str, pictures: int) -> tuple[Message, ...]:
    """A user's message: the pictures, then the text."""
    parts = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    return ({"role": "user", "content": parts},)


REFERENCE = Idefics3Reference
