"""The two models with the forward passes that training needs.

The modules are transformers' own. What is added is speed: all pictures of a batch have one grid,
so the tower's attention runs over [B, N] instead of one picture, or one window, after another; the
text's keys and values are not repeated for the queries that share them. PyTorch's own fused
attention is ten times slower in bfloat16 on a CPU. Tests hold both equal to transformers' own.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.masking_utils import eager_mask
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from training.fitting import token_loss
from training.shapes_qwen.batches import Batch
from training.shapes_qwen.families import FAMILIES, Family
from training.shapes_qwen.pictures import FRAMES, MERGE, PATCH, Grid, patches

QwenConfig = Qwen2_5_VLConfig | Qwen3VLConfig
QwenModel = Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration

HIDDEN, VISION = 128, 96
WINDOW_TOKENS = 2  # along each side of a window
CONTEXT = 2048
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": VISION,
    "intermediate_size": 256,
    "num_heads": 3,
    "out_hidden_size": HIDDEN,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
}


def model_config(family: Family, ids: dict[str, int]) -> QwenConfig:
    """Sizes for a checkpoint below 4 MB; `ids` are those of config.json, and `vocab_size`.

    The rotary bases are small because pictures and heads are. Of Qwen2.5's 16 frequencies the
    first belong to time and the last to columns: at the real base, a million, the columns' would
    stand still. Far below 1,000, no frequency is left that is slow enough to find words by.
    """
    text = {**TEXT, **{key: ids[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}}
    outer = {key: value for key, value in ids.items() if key not in text}
    if family.name == "qwen3":
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
        return Qwen3VLConfig(
            text_config={
                **text,
                "head_dim": 32,
                "rope_parameters": {**rope, "rope_theta": 10000.0},
            },
            vision_config={
                **TOWER,
                "intermediate_size": 224,
                "depth": 5,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [1, 3],
            },
            tie_word_embeddings=False,
            **outer,
        )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 11], "rope_theta": 10000.0}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            **TOWER,
            "depth": 6,
            "window_size": WINDOW_TOKENS * MERGE * PATCH,
            "fullatt_block_indexes": [2, 5],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=False,
        **outer,
    )


class Seen(NamedTuple):
    """What the tower makes of B pictures of N patches and T tokens.

    tokens: [B, T, D]; lanes: as many more as the family has; patches: [B, N, C], normalised as
    the tokens' merger does, in merge order.
    """

    tokens: torch.Tensor
    lanes: list[torch.Tensor]
    patches: torch.Tensor


class Chat(nn.Module):
    """A model, what its tower sees, and the loss where it speaks."""

    def __init__(self, family: Family, config: QwenConfig) -> None:
        super().__init__()
        kind = {
            "qwen2.5": Qwen2_5_VLForConditionalGeneration,
            "qwen3": Qwen3VLForConditionalGeneration,
        }[family.name]
        attention = {"": "eager", "text_config": "grouped", "vision_config": "one_grid"}
        self.family = family
        self.vlm = kind._from_config(config, attn_implementation=attention)
        self.tower = self.vlm.model.visual
        self.text = self.vlm.model.language_model
        windowed = getattr(self.tower.config, "fullatt_block_indexes", range(10**6))
        for index, block in enumerate(self.tower.blocks):
            block.attn.windowed = index not in windowed
        # PyTorch's CPU convolution takes a hundred times as long to learn.
        embed = self.tower.patch_embed
        embed.forward = lambda flat: linear(flat, embed.proj.weight.flatten(1), embed.proj.bias)

    def mergers(self) -> list[nn.Parameter]:
        """The weights between patches and tokens."""
        rest = getattr(self.tower, "deepstack_merger_list", [])
        return [weight for part in (self.tower.merger, *rest) for weight in part.parameters()]

    def spoken(self) -> list[nn.Parameter]:
        """The weights of the language model, its head among them."""
        return [*self.text.parameters(), *self.vlm.lm_head.parameters()]

    def see(self, pixels: torch.Tensor) -> Seen:
        """[B, H, W, 3] uint8 → what the tower makes of it."""
        B, H, W, _ = pixels.shape
        grid = Grid(H // PATCH, W // PATCH)
        known = _places(self.family, grid, B)
        restore = known.pop("restore", None)
        thw = torch.tensor([[1, *grid]] * B)
        flat = patches(pixels, self.family).flatten(0, 1)
        seen = self.tower(flat, grid_thw=thw, pictures=B, **known)
        hidden = seen.last_hidden_state
        if restore is not None:
            hidden = hidden.view(-1, MERGE**2, VISION)[restore].flatten(0, 1)
        merger = self.tower.merger
        norm = merger.norm if self.family.lanes else merger.ln_q
        lanes = seen.deepstack_features if self.family.lanes else []
        return Seen(
            seen.pooler_output.view(B, -1, HIDDEN),
            [lane.view(B, -1, HIDDEN) for lane in lanes],
            norm(hidden).view(B, -1, VISION),
        )

    def loss(self, batch: Batch, features: torch.Tensor, lanes: list[torch.Tensor]) -> torch.Tensor:
        """Mean loss of the spoken tokens; features and lanes [B, T, D] of all of a row's
        pictures, in the places of the image tokens."""
        ids = batch.ids[:, :-1]
        embeds = self.text.embed_tokens(ids)
        places = ids == self.vlm.config.image_token_id
        embeds = embeds.masked_scatter(places[..., None], features.to(embeds.dtype))
        deep = {}
        if lanes:
            deep = {
                "visual_pos_masks": places,
                "deepstack_visual_embeds": [lane.flatten(0, 1) for lane in lanes],
            }
        hidden = self.text(
            inputs_embeds=embeds,
            position_ids=batch.positions[:, :, :-1],
            use_cache=False,
            **deep,
        ).last_hidden_state
        labels = batch.labels[:, 1:]
        spoken = labels >= 0
        return token_loss(self.vlm.lm_head(hidden[spoken])[None], labels[spoken][None])


def one_grid_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    pictures: int,
    windows: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, H, B·N, d] each → [1, B·N, H, d]: attention within each of B pictures of N patches.

    Args:
        windows: [N, N], minus infinity between two windows; for blocks that look at one.
    """
    _, H, L, d = query.shape
    query, key, value = (
        part.view(H, pictures, L // pictures, d).transpose(0, 1) for part in (query, key, value)
    )
    scores = query @ key.transpose(-1, -2) * scaling
    if windows is not None and module.windowed:
        scores = scores + windows
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).reshape(1, L, H, d), None


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[B, H, S, d] and twice [B, K, S, d] → [B, S, H, d]; mask [B, 1, S, S]; in value's type."""
    B, H, S, d = query.shape
    K = key.shape[1]
    shared = (query * scaling).to(value.dtype).reshape(B, K, H // K * S, d)
    scores = (shared @ key.to(value.dtype).transpose(-1, -2)).view(B, H, S, S)
    weights = (scores + attention_mask.to(value.dtype)).softmax(dim=-1)
    mixed = weights.view(B, K, H // K * S, S) @ value
    return mixed.view(B, H, S, d).transpose(1, 2).contiguous(), None


AttentionInterface.register("one_grid", one_grid_attention)
AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)


def _places(family: Family, grid: Grid, pictures: int) -> dict[str, torch.Tensor]:
    """The tower's positions and order for B pictures of one grid, as its keyword arguments.

    `restore` is beside them: the order of merge blocks before that of the windows.
    """
    one = _places_of_one(family.name, grid)
    known = {key: value.repeat(pictures, 1) for key, value in one.items() if key not in WINDOWS}
    length = torch.tensor([0, grid.rows * grid.columns * pictures], dtype=torch.int32)
    known["cu_seqlens"] = length
    if "window_index" in one:
        starts = torch.arange(pictures)[:, None] * grid.tokens
        known["window_index"] = (one["window_index"] + starts).flatten()
        known["restore"] = known["window_index"].argsort()
        known["cu_window_seqlens"] = length
        known["windows"] = one["windows"]
    return known


WINDOWS = ("window_index", "windows")


@cache
def _places_of_one(family: str, grid: Grid) -> dict[str, torch.Tensor]:
    thw = torch.tensor([[1, *grid]])
    known = {"position_ids": get_vision_position_ids(thw, MERGE)}
    if FAMILIES[family].lanes:
        indices, weights = get_vision_interpolation_indices_and_weights(
            thw, 8, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
        )
        return {**known, "interp_indices": indices, "interp_weights": weights}
    index, ends = get_vision_window_index(thw, MERGE, WINDOW_TOKENS * MERGE * PATCH, PATCH)
    window = torch.searchsorted(ends[1:], torch.arange(grid.rows * grid.columns), right=True)
    apart = window[:, None] != window[None, :]
    bias = torch.zeros(apart.shape).masked_fill(apart, -torch.inf)
    return {**known, "window_index": index, "windows": bias}
