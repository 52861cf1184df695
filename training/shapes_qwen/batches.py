"""Conversations drawn on the fly: the same seed, stage and step give the same batch anywhere.

All rows of a batch have pictures of the same grids, so that the tower sees them as one array;
from batch to batch the grids change.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from training.fitting import IGNORE
from training.questions import Exchange, conversation
from training.shapes.batches import patch_answers, patch_geometry
from training.shapes.scenes import Scene, draw, random_scene
from training.shapes_qwen.families import Family
from training.shapes_qwen.pictures import (
    PATCH,
    Canvases,
    Grid,
    grid_of,
    in_merge_order,
    random_canvas,
    resized,
)
from training.shapes_qwen.prompts import IMAGE, image_text, positions, render

TWO_PICTURES = 0.3  # share of the batches


class Shown(NamedTuple):
    """One picture of each of B rows, all of one grid of N patches.

    pixels: [B, H, W, 3] uint8; empty where pictures are not drawn.
    answers: [B, N, 6] int64; geometry: [B, N, 22] float32; both in merge order.
    """

    pixels: torch.Tensor
    answers: torch.Tensor
    geometry: torch.Tensor
    rows: int
    columns: int

    @property
    def grid(self) -> Grid:
        return Grid(self.rows, self.columns)


class Batch(NamedTuple):
    """B conversations of S tokens about one or two pictures.

    ids, labels: [B, S] int64, padded at the end; labels are IGNORE but where the model speaks.
    positions: [3, B, S] int64.
    """

    shown: list[Shown]
    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class Conversations(Dataset[Batch]):
    """Item `i` is the i-th batch of a stage."""

    def __init__(
        self,
        stage: str,
        steps: int,
        batch_size: int,
        tokenizer: Tokenizer,
        family: Family,
        *,
        turns: int,
        drawn: bool,
        kinds: Mapping[str, float] | None = None,
        canvases: Canvases,
    ) -> None:
        self.stage, self.steps, self.batch_size = stage, steps, batch_size
        self.tokenizer, self.family = tokenizer, family
        self.turns, self.drawn, self.kinds, self.canvases = turns, drawn, kinds, canvases

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.stage}-{step}")
        count = 2 if self.turns and rng.random() < TWO_PICTURES else 1
        grids = [self._random_grid(rng) for _ in range(count)]
        rows = [drawn_scenes(rng, grids, self.canvases) for _ in range(self.batch_size)]
        shown = [
            show(list(scenes), grid, self.canvases, drawn=self.drawn)
            for scenes, grid in zip(zip(*rows, strict=True), grids, strict=True)
        ]
        texts = [image_text(grid) for grid in grids]
        encoded = [
            encode(
                self.tokenizer,
                conversation(scenes, rng, self.turns, self.kinds),
                texts,
                self.family,
            )
            for scenes in rows
            if self.turns
        ]
        return Batch(shown, *pad(encoded, self.tokenizer.token_to_id(IMAGE), grids))

    def _random_grid(self, rng: random.Random) -> Grid:
        return grid_of(*random_canvas(rng, canvases=self.canvases), self.canvases)


def conversations(
    stage: str,
    steps: int,
    batch_size: int,
    tokenizer: Tokenizer,
    family: Family,
    *,
    turns: int,
    drawn: bool,
    kinds: Mapping[str, float] | None = None,
    canvases: Canvases,
) -> DataLoader[Batch]:
    """A loader over `Conversations` in order, drawn by one worker process.

    Args:
        turns: exchanges of one conversation, at most; 0 for single pictures without a word.
        kinds: how often a kind of question is drawn, 1 where it does not stand here; None: evenly.
    """
    data = Conversations(
        stage,
        steps,
        batch_size,
        tokenizer,
        family,
        turns=turns,
        drawn=drawn,
        kinds=kinds,
        canvases=canvases,
    )
    return DataLoader(data, batch_size=None, shuffle=False, num_workers=1, prefetch_factor=8)


def drawn_scenes(rng: random.Random, grids: Sequence[Grid], canvases: Canvases) -> list[Scene]:
    """One scene, in which three things are the hard case and half of all; or a pair."""
    counts = (1, 2) if len(grids) == 2 else (1, 2, 2, 3, 3, 3)
    return [
        random_scene(rng, rng.choice(counts), random_canvas(rng, grid, canvases)) for grid in grids
    ]


def show(scenes: Sequence[Scene], grid: Grid, canvases: Canvases, *, drawn: bool) -> Shown:
    """Scenes whose pictures have one grid, and what there is to know of each patch."""
    pixels = [resized(draw(scene), canvases) for scene in scenes if drawn]
    answers, geometry = (
        [in_merge_order(know(scene, grid.size, PATCH), grid) for scene in scenes]
        for know in (patch_answers, patch_geometry)
    )
    parts = (torch.from_numpy(np.array(part)) for part in (pixels, answers, geometry))
    return Shown(*parts, *grid)


def encode(
    tokenizer: Tokenizer, exchanges: Sequence[Exchange], pictures: Sequence[str], family: Family
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the labels: ids where the model speaks, else IGNORE."""
    ids: list[int] = []
    labels: list[int] = []
    for text, spoken in render(exchanges, pictures, family):
        part = tokenizer.encode(text, add_special_tokens=False).ids
        ids += part
        labels += part if spoken else [IGNORE] * len(part)
    return ids, labels


def pad(
    rows: Sequence[tuple[list[int], list[int]]], image_id: int, grids: Sequence[Grid]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and labels [B, S], padded at the end with 0 and IGNORE; positions [3, B, S]."""
    longest = max((len(ids) for ids, _ in rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORE)
    places = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for row, (tokens, targets) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(targets)] = torch.tensor(targets)
        places[:, row, : len(tokens)] = torch.from_numpy(positions(tokens, image_id, grids))
    return ids, labels, places
