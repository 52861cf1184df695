"""The reference of Qwen2.5-VL and Qwen3-VL: Hugging Face's models, tokenizer, processor on Pillow.

`generate` runs the whole model from the pixels, as its users do; `logits` is given what the ladder
hands from rung to rung. Where both agree, features, lanes and positions are split and joined as in
the model.

Traps:
- Without mm_token_type_ids the model counts positions as if there were no pictures.
- The model keeps the offset of the last prompt's positions; positions are therefore always given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image

from vlmport.parity.asked import Request
from vlmport.parity.pictures import Picture, drawn_pictures
from vlmport.parity.protocol import Generated
from vlmport.parity.reference_errors import in_one_line
from vlmport.parity.references.base import PretrainedReference, user_message
from vlmport.parity.references.loading import generated_from, quietly

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CAPTION = "Describe this image."
# The built-in models know it. A question that a model never saw, it answers with a thin margin.
QUESTION = "What is in this image?"
# Sides of images in addition to the ladder's own, in units of a merged patch: both sides exactly
# between two multiples, which Python rounds to the even one; a strip; less than a patch; a square.
SIDES = ((12.5, 6.5), (1.0, 9.0), (0.25, 0.25), (7.0, 7.0), (3.4, 8.7))
PROCESSORS: dict[str, Any] = {
    "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
    "qwen3_vl": transformers.Qwen3VLProcessor,
}


@in_one_line
class QwenVLReference(PretrainedReference):
    """A checkpoint of either model type."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        image_token_id: int,
        adapter: str | Path | None = None,
        ignored: Collection[str] = (),
    ):
        super().__init__(folder, config, image_token_id, adapter, ignored)
        vision = self.model.config.vision_config
        self.lanes = len(getattr(vision, "deepstack_visual_indexes", ()))

    def _processor_class(self, config: Mapping[str, Any]) -> Any:
        return PROCESSORS[config["model_type"]]

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """Ask about images of eight grids at least, with other limits of their size, about two over
        two turns, about three in one message, and about none, in one turn and two."""
        processor = self.image_processor
        factor = processor.patch_size * processor.merge_size
        sizes = [(max(1, round(w * factor)), max(1, round(h * factor))) for w, h in SIDES]
        taken = {one.image.size for one in pictures}
        pictures = [*pictures, *drawn_pictures([size for size in sizes if size not in taken])]
        asked, question = user_message(CAPTION, 1), user_message(QUESTION, 1)
        requests = [Request(one.name, (one,), asked, is_caption=True) for one in pictures]
        most = {"max_pixels": 9 * factor**2, "min_pixels": 4 * factor**2}
        least = {"max_pixels": 40 * factor**2, "min_pixels": 30 * factor**2}
        requests.append(Request("few pixels", (pictures[0],), question, options=most))
        requests.append(Request("more pixels", (pictures[-1],), question, options=least))
        turns = (
            *question,
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
            *user_message("Which is larger?", 1),
        )
        few = {"max_pixels": 25 * factor**2, "min_pixels": 4 * factor**2}
        requests.append(
            Request("two pictures, two turns", tuple(pictures[1:3]), turns, options=few)
        )
        three = (pictures[2], pictures[0], pictures[1])
        requests.append(Request("three pictures", three, user_message(QUESTION, 3), options=few))
        requests.append(Request("text alone", (), user_message("Why is the sky blue?", 0)))
        talk = ({"role": "system", "content": "Be brief."}, *user_message("Who are you?", 0))
        talk = (*talk, {"role": "assistant", "content": "A model."}, *user_message("Which?", 0))
        requests.append(Request("text of two turns", (), talk))
        return requests

    def pixels(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Return pixel_values float32 [N, K] and image_grid_thw int64 [1, 3]."""
        made = self._process(self.processor.image_token, [image], options or {})
        return {name: made[name] for name in ("pixel_values", "image_grid_thw")}

    def at_size(self, request: Request, width: int, height: int) -> Request:
        filter_, pixels = Image.Resampling(self.image_processor.resample), width * height
        pictures = tuple(
            Picture(one.name, one.image.resize((width, height), filter_))
            for one in request.pictures
        )
        options = {"min_pixels": pixels, "max_pixels": pixels}
        return dataclasses.replace(request, pictures=pictures, options=options)

    def planes(self, pixels: Mapping[str, np.ndarray]) -> Float[np.ndarray, "1 3 h w"]:
        """Put the patches of the first frame together; all frames are alike."""
        merge, side = self.image_processor.merge_size, self.image_processor.patch_size
        _, rows, columns = pixels["image_grid_thw"][0]
        blocks = (rows // merge, columns // merge, merge, merge)
        patches = pixels["pixel_values"].reshape(*blocks, 3, -1, side, side)[..., 0, :, :]
        patches = patches.transpose(4, 0, 2, 5, 1, 3, 6)  # 3, (rows, m, p), (columns, m, p)
        return np.ascontiguousarray(patches.reshape(1, 3, rows * side, columns * side))

    def _process(
        self, text: str, images: Sequence[Image.Image], options: Mapping[str, Any]
    ) -> Mapping[str, np.ndarray]:
        if not images:
            return self.processor(text=text, return_tensors="np")
        size = dict(self.image_processor.size)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            size[edge] = options.get(name, size[edge])
        return self.processor(text=text, images=list(images), size=size, return_tensors="np")

    @quietly
    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T W"]:
        """Return features, then the lanes of DeepStack: W is D·(1+n)."""
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        made = self.model.get_image_features(**tensors)
        lanes = [torch.cat(lane) for lane in getattr(made, "deepstack_features", None) or ()]
        return torch.cat([torch.cat(made.pooler_output), *lanes], dim=-1).numpy()

    def position_ids(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Int[np.ndarray, "3 S"]:
        """Count positions in time, height and width, by the model's own get_rope_index."""
        inputs = self._inputs(ids, pictures)
        inputs.pop("pixel_values", None)
        return self.model.model.get_rope_index(**inputs)[0][:, 0].numpy()

    def _inputs(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, torch.Tensor]:
        """Make the processor's inputs for a prompt, in a batch of one."""
        tokens = torch.from_numpy(np.asarray(ids))[None]
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "mm_token_type_ids": (tokens == self.image_token_id).int(),
        }
        for name in ("pixel_values", "image_grid_thw") if pictures else ():
            whole = np.concatenate([picture[name] for picture in pictures])
            inputs[name] = torch.from_numpy(whole)
        return inputs

    @quietly
    def logits(
        self, embeds: Float[np.ndarray, "S W"], position_ids: Int[np.ndarray, "3 S"]
    ) -> Float[np.ndarray, "S V"]:
        """Run one causal pass over the whole sequence, without a cache. A row belongs to an image
        where its lanes are not zero."""
        width = self.dims["hidden_size"]
        plain, lanes = embeds[:, :width], embeds[:, width:]
        stacked: dict[str, Any] = {}
        if self.lanes:
            visual = lanes.any(axis=1)
            parts = np.split(lanes[visual], self.lanes, axis=1)
            stacked["visual_pos_masks"] = torch.from_numpy(visual)[None]
            stacked["deepstack_visual_embeds"] = [torch.from_numpy(part) for part in parts]
        hidden = self.model.model.language_model(
            inputs_embeds=torch.from_numpy(np.ascontiguousarray(plain))[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            position_ids=torch.from_numpy(np.asarray(position_ids))[:, None],
            use_cache=False,
            **stacked,
        ).last_hidden_state
        return self.model.lm_head(hidden)[0].numpy()

    @quietly
    def generate(
        self,
        embeds: Float[np.ndarray, "S W"],
        max_new_tokens: int,
        ids: Int[np.ndarray, " S"],
        pictures: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> Generated:
        """Run `generate(input_ids=…, pixel_values=…)` greedily; it takes nothing from `embeds`."""
        inputs = self._inputs(ids, pictures)
        return generated_from(self.model, inputs, max_new_tokens, self.stop_token_ids)


REFERENCE = QwenVLReference
