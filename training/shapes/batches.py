"""Batches drawn on the fly: the same seed, stage and step give the same batch on any machine."""

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from training.fitting import IGNORE
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

CELLS, LENGTHS = 16, 6  # parts of a patch's geometry
RELATIONS = ("above", "below", "left of", "right of")
# What there is to know of each patch (for notes and tower), and how many answers there are.
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
    """B scenes: pictures [B,size,size,3] uint8 if drawn, caption ids [B,S] int64 (0-padded),
    patch answers [B,N,6] int64 and patch geometry [B,N,22] float32."""

    images: torch.Tensor
    ids: torch.Tensor
    answers: torch.Tensor
    geometry: torch.Tensor


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
        drawn: bool,
    ) -> None:
        self.stage, self.steps, self.batch_size = stage, steps, batch_size
        self.tokenizer, self.image_size, self.grid = tokenizer, image_size, grid
        self.drawn = drawn

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.stage}-{step}")
        # Three objects are the hard case: half of the batch.
        counts = [rng.choice((1, 2, 2, 3, 3, 3)) for _ in range(self.batch_size)]
        scenes = [random_scene(rng, count) for count in counts]
        images = [squash(draw(scene), self.image_size) for scene in scenes if self.drawn]
        size, patch = (self.image_size, self.image_size), self.image_size // self.grid
        answers = [patch_answers(scene, size, patch) for scene in scenes]
        geometry = [patch_geometry(scene, size, patch) for scene in scenes]
        ids = encode_captions(self.tokenizer, [caption(scene) for scene in scenes])
        pictures, known, places = (
            torch.from_numpy(np.array(part)) for part in (images, answers, geometry)
        )
        return Batch(pictures, ids, known, places)


def drawn_batches(
    stage: str,
    steps: int,
    batch_size: int,
    tokenizer: Tokenizer,
    image_size: int,
    grid: int,
    drawn: bool,
) -> DataLoader[Batch]:
    """A loader over `DrawnBatches` in order, drawn by one worker process."""
    data = DrawnBatches(stage, steps, batch_size, tokenizer, image_size, grid, drawn)
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


def note_ids(answers: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """[B,N,6] patch answers -> [B,N,6] ids of the caption's words for them; 0 for no word."""
    words = {
        "background": tuple(BACKGROUNDS),
        "shape": ("", *SHAPES),
        "colour": ("", *PALETTE),
        "size": ("", *("" if size == "medium" else size for size in SIZES)),
        "rank": ("", "", "", ""),
        "relation": ("", *RELATIONS, ""),
    }
    table = torch.zeros(len(PATCH_QUESTIONS), 1 + max(PATCH_QUESTIONS.values()), dtype=torch.int64)
    for row, question in zip(table, PATCH_QUESTIONS, strict=True):
        for answer, word in enumerate(words[question]):
            row[answer] = tokenizer.encode(f" {word}").ids[0] if word else 0
    # An ignored answer falls on the last column, which stays 0.
    columns = answers.masked_fill(answers == IGNORE, table.shape[1] - 1)
    return table[torch.arange(len(PATCH_QUESTIONS)), columns]


def patch_answers(scene: Scene, size: tuple[int, int], patch: int) -> np.ndarray:
    """[N, 6] int64: the answers to `PATCH_QUESTIONS` at each patch, row by row.

    Args:
        size: width and height to which the picture is resized, multiples of `patch`.
    """
    coverage, owner = _owners(scene, size, patch)
    answers = np.zeros((len(owner), len(PATCH_QUESTIONS)), np.int64)
    answers[coverage > TOUCHED, 1:] = IGNORE
    for index, thing in enumerate(scene.things):
        answers[owner == index, 1:] = _thing_answers(scene, index, thing)
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


def patch_geometry(scene: Scene, size: tuple[int, int], patch: int) -> np.ndarray:
    """[N, 22] float32, lengths in patches; sizes as in `patch_answers`.

    0-15: covered share of the patch's 4 x 4 cells. 16-19: left, top, right and bottom of the
    patch's object, from the patch's centre. 20-21: centre of the next named object, likewise.
    NaN where there is none.
    """
    columns, rows = size[0] // patch, size[1] // patch
    mask = _mask(scene, scene.things, size).reduce(patch // 4)
    cells = np.asarray(mask, np.float32).reshape(rows, 4, columns, 4).swapaxes(1, 2) / 255
    places = np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5)
    centres = np.stack(places, axis=-1).reshape(-1, 2)
    lengths = np.full((rows * columns, 6), np.nan)
    _, owner = _owners(scene, size, patch)
    unit = np.array([columns, rows]) / np.array([scene.width, scene.height])
    for index, thing in enumerate(scene.things):
        here = owner == index
        box = np.reshape(thing.box, (2, 2)) * unit
        lengths[here, :4] = (box - centres[here, None]).reshape(-1, 4)
        for following in scene.things[index + 1 : index + 2]:
            centre = np.array([following.cx, following.cy]) * unit
            lengths[here, 4:] = centre - centres[here]
    return np.concatenate([cells.reshape(-1, 16), lengths], axis=1).astype(np.float32)


def _owners(scene: Scene, size: tuple[int, int], patch: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] greatest share that one thing covers, and that thing's index or -1."""
    masks = [_mask(scene, (thing,), size).reduce(patch) for thing in scene.things]
    coverage = np.stack([np.asarray(mask, np.float32).reshape(-1) / 255 for mask in masks])
    owner = np.full(coverage.shape[1], -1)
    for index, share in enumerate(coverage):
        owner[share >= min(COVERED, share.max())] = index
    return coverage.max(axis=0), owner


def _mask(scene: Scene, things: tuple[Thing, ...], size: tuple[int, int]) -> Image.Image:
    """Mode L, 255 where the things are on the resized picture."""
    mask = Image.new("L", size, 0)
    x, y = size[0] / scene.width, size[1] / scene.height
    for thing in things:
        corners = [
            ((thing.cx + thing.side * u) * x, (thing.cy + thing.side * v) * y)
            for u, v in OUTLINES[thing.shape]
        ]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask
