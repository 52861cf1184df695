"""Batches drawn on the fly: the same seed, stage and step give the same batch on any machine."""

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from training.shapes.scenes import (
    BACKGROUNDS,
    OUTLINES,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    draw,
    random_scene,
    relation,
    squash,
)

IGNORE = -100
RELATIONS = ("above", "below", "left of", "right of")
# What each patch is asked while the tower is pretrained, and how many answers there are.
# 0 means "no object here"; `relation` is to the next named object, 5 for the last one.
PATCH_QUESTIONS: dict[str, int] = {
    "background": len(BACKGROUNDS),
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(PALETTE),
    "size": 1 + len(SIZES),
    "rank": 1 + 3,
    "relation": 1 + len(RELATIONS) + 1,
}
COVERED = 0.15  # least share of a patch that makes it an object's
TOUCHED = 0.01  # patches between the two are asked nothing about objects


class Batch(NamedTuple):
    """B scenes: [B,size,size,3] uint8, [B,S] int64 (0-padded), [B,N,6] patch answers, if asked."""

    images: torch.Tensor
    ids: torch.Tensor
    answers: torch.Tensor


class DrawnBatches(Dataset[Batch]):
    """Item `i` is the i-th batch of a stage."""

    def __init__(
        self,
        stage: str,
        steps: int,
        batch_size: int,
        tokenizer: Tokenizer,
        image_size: int,
        grid: int,
        answered: bool,
    ) -> None:
        self.stage, self.steps, self.batch_size = stage, steps, batch_size
        self.tokenizer, self.image_size, self.grid = tokenizer, image_size, grid
        self.answered = answered

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.stage}-{step}")
        # Three objects are the hard case: half of the batch.
        counts = [rng.choice((1, 2, 2, 3, 3, 3)) for _ in range(self.batch_size)]
        scenes = [random_scene(rng, count) for count in counts]
        images = np.stack([squash(draw(scene), self.image_size) for scene in scenes])
        answers = [patch_answers(s, self.image_size, self.grid) for s in scenes if self.answered]
        ids = encode_captions(self.tokenizer, [caption(scene) for scene in scenes])
        return Batch(torch.from_numpy(images), ids, torch.from_numpy(np.array(answers)))


def drawn_batches(
    stage: str,
    steps: int,
    batch_size: int,
    tokenizer: Tokenizer,
    image_size: int,
    grid: int,
    answered: bool,
) -> DataLoader[Batch]:
    """A loader over `DrawnBatches` in order, drawn by one worker process."""
    data = DrawnBatches(stage, steps, batch_size, tokenizer, image_size, grid, answered)
    return DataLoader(data, batch_size=None, shuffle=False, num_workers=1, prefetch_factor=8)


def encode_captions(tokenizer: Tokenizer, captions: list[str]) -> torch.Tensor:
    """[B,S] int64: caption ids, then at least one 0, the end as distilvit2 learns it."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(captions)]
    ids = torch.zeros(len(rows), max(map(len, rows)) + 1, dtype=torch.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return ids


def caption_labels(ids: torch.Tensor) -> torch.Tensor:
    """[B,S]: ids with every padding after the first one ignored."""
    ended = (ids == 0).cumsum(dim=1) > 1
    return ids.masked_fill(ended, IGNORE)


def patch_answers(scene: Scene, image_size: int, grid: int) -> np.ndarray:
    """[grid², 6] int64: the answers to `PATCH_QUESTIONS` at each patch, row by row."""
    answers = np.zeros((grid * grid, len(PATCH_QUESTIONS)), np.int64)
    coverage = np.stack([_coverage(scene, thing, image_size, grid) for thing in scene.things])
    answers[coverage.max(axis=0) > TOUCHED, 1:] = IGNORE
    for index, thing in enumerate(scene.things):
        covered = coverage[index] >= min(COVERED, coverage[index].max())
        answers[covered, 1:] = _thing_answers(scene, index, thing)
    answers[:, 0] = tuple(BACKGROUNDS).index(scene.background)
    return answers


def _thing_answers(scene: Scene, index: int, thing: Thing) -> list[int]:
    links = [RELATIONS.index(relation(scene, a, b)) for a, b in pairwise(scene.things)]
    links.append(len(RELATIONS))
    return [
        1 + SHAPES.index(thing.shape),
        1 + tuple(PALETTE).index(thing.colour),
        1 + tuple(SIZES).index(thing.size),
        1 + index,
        1 + links[index],
    ]


def _coverage(scene: Scene, thing: Thing, image_size: int, grid: int) -> np.ndarray:
    """[grid²] share of each patch that the thing covers, on the squashed picture."""
    mask = Image.new("L", (image_size, image_size), 0)
    corners = [
        (
            (thing.cx + thing.side * u) / scene.width * image_size,
            (thing.cy + thing.side * v) / scene.height * image_size,
        )
        for u, v in OUTLINES[thing.shape]
    ]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return np.asarray(mask.reduce(image_size // grid), np.float32).reshape(-1) / 255
