"""The parts of a reference that do not depend on its model family.

`BaseReference` is a decoder that reads image features in the place of image tokens, and counts
positions from 0. `PretrainedReference` is a model that transformers loads whole, with a processor.
A family's `reference.py` adds its requests, its pixels, and what its model does otherwise.

S sequence, T image tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlmport.errors import PromptError
from vlmport.parity.asked import Message, Request
from vlmport.parity.protocol import Generated
from vlmport.parity.reference_errors import in_one_line
from vlmport.parity.references.adapter_files import (
    with_adapter_generation,
    with_adapter_processor,
)
from vlmport.parity.references.adapters import add_adapter
from vlmport.parity.references.loading import (
    decoder_dims,
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


@in_one_line
class BaseReference:
    """A model in float32 on PyTorch, as vlmport.parity.protocol.Reference describes it.

    Attributes:
        model: the whole model.
        decoder: the part of it that has the head and `generate`.
        lanes: how many values of each row, in units of D, follow its embedding (DeepStack).
    """

    lanes = 0

    def __init__(
        self,
        model: Any,
        decoder: Any,
        *,
        text_config: Any,
        image_processor: Any,
        image_token_id: int,
        stop_token_ids: tuple[int, ...],
    ):
        self.model, self.decoder = model.eval().requires_grad_(False), decoder
        self.threads = useful_threads(sum(weight.numel() for weight in model.parameters()))
        self.image_token_id, self.stop_token_ids = image_token_id, stop_token_ids
        self.grey_level = image_processor.rescale_factor / min(image_processor.image_std)
        self.dims: Mapping[str, int] = decoder_dims(text_config)
        self.versions = versions()

    @quietly
    def embeds(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T W"]
    ) -> Float[np.ndarray, "S W"]:
        """Embed ids, and write features over the rows of image tokens: W is D·(1+lanes).

        The lanes of text are zeros. Raises PromptError unless there are as many image tokens as
        features.
        """
        image = np.asarray(ids) == self.image_token_id
        if image.sum() != len(features):
            raise PromptError(
                f"{image.sum()} image tokens in the prompt, {len(features)} features",
                code="prompt.wrong-features",
            )
        # The image token of a checkpoint that has none may be past the end of the table.
        table, words = self.decoder.get_input_embeddings(), np.where(image, 0, ids)
        plain = table(torch.from_numpy(words)).numpy()
        embeds = np.pad(plain, ((0, 0), (0, self.lanes * plain.shape[1])))
        if image.any():  # else the features of no image, which may be narrower
            embeds[image] = features
        return embeds

    def position_ids(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Int[np.ndarray, "... S"]:
        """Count 0 … S-1, as a Llama does without any positions given."""
        return np.arange(len(ids), dtype=np.int64)

    @quietly
    def logits(
        self, embeds: Float[np.ndarray, "S W"], position_ids: Int[np.ndarray, "... S"]
    ) -> Float[np.ndarray, "S V"]:
        """Run one causal pass over the whole sequence, without a cache."""
        output = self.decoder(
            inputs_embeds=torch.from_numpy(embeds)[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            position_ids=torch.from_numpy(position_ids)[None],
            use_cache=False,
        )
        return output.logits[0].numpy()

    @quietly
    def generate(
        self,
        embeds: Float[np.ndarray, "S W"],
        max_new_tokens: int,
        ids: Int[np.ndarray, " S"],
        pictures: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> Generated:
        """Run `generate(inputs_embeds=…)` greedily; it counts positions itself."""
        return generated(self.decoder, embeds, max_new_tokens, self.stop_token_ids)


@in_one_line
class PretrainedReference(BaseReference, ABC):
    """A checkpoint that transformers loads whole, with the adapter and the processor."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        image_token_id: int,
        adapter: str | Path | None = None,
        ignored: Collection[str] = (),
    ):
        model, files = load_model(folder, ignored), None if adapter is None else Path(adapter)
        if files is not None:
            add_adapter(model, files)
        with_adapter_generation(model, files)
        kind = self._processor_class(config)
        self.processor = with_adapter_processor(
            lambda path: load_processor(path, kind), folder, files
        )
        self.image_processor = self.processor.image_processor
        stops = answer_stop_ids(model, self.processor)
        forget_options(model)
        super().__init__(
            model,
            model,
            text_config=model.config.text_config,
            image_processor=self.image_processor,
            image_token_id=model.config.image_token_id,
            stop_token_ids=stops,
        )

    @abstractmethod
    def _processor_class(self, config: Mapping[str, Any]) -> Any:
        """Choose transformers' class of the processor, for a config.json."""

    @abstractmethod
    def _process(
        self, text: str, images: Sequence[Image.Image], options: Mapping[str, Any]
    ) -> Mapping[str, np.ndarray]:
        """Run the processor on a prompt's text and its images."""

    def image_ids(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> Int[np.ndarray, " T"]:
        """Return the ids of this image in a prompt."""
        return self._process(self.processor.image_token, [image], options or {})["input_ids"][0]

    def prompt_ids(self, request: Request) -> Int[np.ndarray, " S"]:
        """Return the ids of the whole prompt."""
        text = prompt_text(self.processor, request)
        return self._process(text, request.images, request.options)["input_ids"][0]


def user_message(text: str, images: int) -> tuple[Message, ...]:
    """Return the message of a user: images, then a text."""
    parts = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    return ({"role": "user", "content": parts},)
