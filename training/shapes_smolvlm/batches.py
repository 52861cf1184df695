"""Conversations drawn on the fly: the same seed, stage and step give the same batch anywhere."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from training.fitting import IGNORE
from training.questions import Exchange, conversation, growing_conversation, scene_pair
from training.shapes.batches import patch_answers
from training.shapes.scenes import Scene, draw, random_scene
from training.shapes_smolvlm.prompts import TILE, image_text, render, tiles

PATCH = 12
GRID = TILE // PATCH  # patches along a tile's side


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
    answers: [B, I, 64, 6] int64, what each patch of the whole picture shows; empty where they are.
    """

    tiles: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    answers: torch.Tensor


@dataclass(frozen=True)
class Diet:
    """What a stage is fed.

    Attributes:
        forms: how often each of FORMS is taken.
        drawn: whether pictures are drawn; answers of their patches otherwise.
        kinds: how often a kind of question is drawn, 1 where it does not stand here; None: evenly.
        growing: share of the pairs whose second picture comes with a later question.
        turns: exchanges of one conversation, at most.
    """

    forms: Sequence[float]
    drawn: bool = True
    kinds: Mapping[str, float] | None = None
    growing: float = 0.0
    turns: int = 6


class Conversations(Dataset[Batch]):
    """Item `i` is the i-th batch of a stage."""

    def __init__(
        self, stage: str, steps: int, batch_size: int, tokenizer: Tokenizer, diet: Diet
    ) -> None:
        self.stage, self.steps, self.batch_size = stage, steps, batch_size
        self.tokenizer, self.diet = tokenizer, diet

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng, drawn = random.Random(f"{self.stage}-{step}"), self.diet.drawn
        (form,) = rng.choices(FORMS, self.diet.forms)
        shown, rows, answers = [], [], []
        for _ in range(self.batch_size):
            scenes = drawn_scenes(rng, form)
            pictures, texts = show(scenes, form) if drawn else ([], [image_text(0, 0)] * 2)
            shown.append(pictures)
            rows.append(encode(self.tokenizer, self._conversation(scenes, rng), texts))
            answers.append([_patches(scene) for scene in scenes if not drawn])
        ids, labels = pad(rows)
        return Batch(
            torch.from_numpy(np.array(shown)), ids, labels, torch.from_numpy(np.array(answers))
        )

    def _conversation(self, scenes: Sequence[Scene], rng: random.Random) -> list[Exchange]:
        diet = self.diet
        grows = diet.growing and len(scenes) == 2 and rng.random() < diet.growing
        drawn = growing_conversation if grows else conversation
        return drawn(scenes, rng, diet.turns, diet.kinds)


def conversations(
    stage: str, steps: int, batch_size: int, tokenizer: Tokenizer, diet: Diet
) -> DataLoader[Batch]:
    """A loader over `Conversations` in order, drawn by one worker process."""
    data = Conversations(stage, steps, batch_size, tokenizer, diet)
    return DataLoader(data, batch_size=None, shuffle=False, num_workers=1, prefetch_factor=8)


def _patches(scene: Scene) -> np.ndarray:
    """[64, 6] int64: what each patch of the whole picture shows."""
    return patch_answers(scene, (TILE, TILE), PATCH)


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
