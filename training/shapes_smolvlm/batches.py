"""Conversations drawn on the fly: the same seed, stage and step give the same batch anywhere."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from training.fitting import IGNORE
from training.questions import Exchange, conversation, scene_pair
from training.shapes.batches import patch_answers
from training.shapes.scenes import Scene, draw, random_scene
from training.shapes_smolvlm.prompts import TILE, image_text, render, tiles

GRID = 8  # patches along a tile's side


@dataclass(frozen=True)
class Form:
    """How the pictures of a batch are shown; all rows of a batch share it."""

    images: int
    split: bool


FORMS = (Form(1, False), Form(1, True), Form(2, False), Form(2, True))


class Batch(NamedTuple):
    """B conversations of S tokens about I pictures of n tiles each.

    tiles: [B, I·n, 96, 96, 3] uint8; empty where pictures are not drawn.
    ids, labels: [B, S] int64, padded at the end; labels are IGNORE but where the model speaks.
    answers: [B, I, 64, 6] int64, what each patch of the whole picture shows.
    """

    tiles: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    answers: torch.Tensor


class Conversations(Dataset[Batch]):
    """Item `i` is the i-th batch of a stage."""

    def __init__(
        self,
        stage: str,
        steps: int,
        batch_size: int,
        tokenizer: Tokenizer,
        weights: Sequence[float],
        *,
        turns: int,
        drawn: bool,
    ) -> None:
        self.stage, self.steps, self.batch_size = stage, steps, batch_size
        self.tokenizer, self.weights = tokenizer, weights
        self.turns, self.drawn = turns, drawn

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.stage}-{step}")
        (form,) = rng.choices(FORMS, self.weights)
        shown, rows, answers = [], [], []
        for _ in range(self.batch_size):
            scenes = drawn_scenes(rng, form)
            pictures, texts = show(scenes, form) if self.drawn else ([], [image_text(0, 0)] * 2)
            shown.append(pictures)
            rows.append(encode(self.tokenizer, conversation(scenes, rng, self.turns), texts))
            answers.append([patch_answers(scene, (TILE, TILE), TILE // GRID) for scene in scenes])
        ids, labels = pad(rows)
        return Batch(
            torch.from_numpy(np.array(shown)), ids, labels, torch.from_numpy(np.array(answers))
        )


def conversations(
    stage: str,
    steps: int,
    batch_size: int,
    tokenizer: Tokenizer,
    weights: Sequence[float],
    *,
    turns: int,
    drawn: bool,
) -> DataLoader[Batch]:
    """A loader over `Conversations` in order, drawn by one worker process.

    Args:
        weights: how often each of FORMS is taken.
        turns: exchanges of one conversation, at most.
    """
    data = Conversations(stage, steps, batch_size, tokenizer, weights, turns=turns, drawn=drawn)
    return DataLoader(data, batch_size=None, shuffle=False, num_workers=1, prefetch_factor=8)


def drawn_scenes(rng: random.Random, form: Form) -> list[Scene]:
    """One scene, in which three things are the hard case and half of all; or a pair."""
    if form.images == 2:
        return scene_pair(rng)
    return [random_scene(rng, rng.choice((1, 2, 2, 3, 3, 3)))]


def show(scenes: Sequence[Scene], form: Form) -> tuple[np.ndarray, list[str]]:
    """All tiles [N, 96, 96, 3] of the pictures, and what stands for each in the prompt."""
    cut = [tiles(draw(scene), split=form.split) for scene in scenes]
    return np.concatenate([one[0] for one in cut]), [image_text(*one[1:]) for one in cut]


def encode(
    tokenizer: Tokenizer, exchanges: Sequence[Exchange], pictures: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the labels: ids where the model speaks, else IGNORE."""
    ids: list[int] = []
    labels: list[int] = []
    for text, spoken in render(exchanges, pictures):
        part = tokenizer.encode(text, add_special_tokens=False).ids
        ids += part
        labels += part if spoken else [IGNORE] * len(part)
    return ids, labels


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [B, S], padded at the end with 0 and IGNORE."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORE)
    for row, (tokens, targets) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(targets)] = torch.tensor(targets)
    return ids, labels
