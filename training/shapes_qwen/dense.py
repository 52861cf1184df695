"""What the tower is asked at every patch, beside the words or before there are any."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    smooth_l1_loss,
)

from training.fitting import IGNORE
from training.shapes.batches import CELLS, LENGTHS, PATCH_QUESTIONS
from training.shapes_qwen.batches import Shown
from training.shapes_qwen.model import VISION
from training.shapes_qwen.pictures import Grid, in_merge_order

NO_OBJECT_WEIGHT = 0.05
EDGES, EDGE_UNIT = 4, 4.0  # patches
BESIDE_PICTURE = 10.0  # a thing's side by the picture's shorter one, 0.19 to 0.48, times this


class DenseHeads(nn.Module):
    """[B, N, C] → the loss of the answers that one linear layer gives at each patch.

    Args:
        questions: weight of the mean loss of `PATCH_QUESTIONS` beside those of the cells and the
            lengths.
        beside_picture: whether patches tell where they are in the picture and how large their
            things are beside it.
        alone: first calls, one a picture, from which the heads learn and the tower does not.
    """

    def __init__(self, questions: float, *, beside_picture: bool = False, alone: int = 0) -> None:
        super().__init__()
        self.questions, self.alone = questions, alone
        self.beside_picture = beside_picture
        sizes = PATCH_QUESTIONS | {"cells": CELLS, "lengths": LENGTHS}
        self.sizes = sizes | ({"edges": EDGES, "share": 1} if beside_picture else {})
        self.answers = nn.Linear(VISION, sum(self.sizes.values()))
        # Most patches show no object: unweighted, they drown shape and size.
        self.weights = {name: torch.ones(size) for name, size in PATCH_QUESTIONS.items()}
        for weight in list(self.weights.values())[1:]:
            weight[0] = NO_OBJECT_WEIGHT
        self.seen: list[torch.Tensor] = []

    def forward(self, patches: torch.Tensor, shown: Shown) -> torch.Tensor:
        patches = patches.detach() if len(self.seen) < self.alone else patches
        parts = self.answers(patches).float().split(list(self.sizes.values()), dim=-1)
        given = dict(zip(self.sizes, parts, strict=True))
        wanted = dict(zip(self.weights, shown.answers.unbind(dim=-1), strict=True))
        losses = [
            cross_entropy(
                given[name].flatten(0, 1), answer.flatten(), self.weights[name], ignore_index=IGNORE
            )
            for name, answer in wanted.items()
        ]
        covered, measured = shown.geometry.split([CELLS, LENGTHS], dim=-1)
        others = [
            binary_cross_entropy_with_logits(given["cells"], covered),
            _distance(given["lengths"], measured),
        ]
        if self.beside_picture:
            edges = edges_of(shown.grid).expand_as(given["edges"])
            others += [2 * _distance(given["edges"], edges)]
            others += [2 * _distance(given["share"], shares_of(measured, shown.grid))]
        self.seen.append(torch.stack([*losses, *others]).detach())
        if len(self.seen) % 100 == 0:
            means = torch.stack(self.seen[-100:]).mean(dim=0).tolist()
            print(*(f"{name} {mean:.3f}" for name, mean in zip(self.sizes, means, strict=True)))
        return self.questions * torch.stack(losses).mean() + torch.stack(others).sum()


def edges_of(grid: Grid) -> torch.Tensor:
    """[N, 4]: how far each patch's centre is from the left, top, right and bottom edge."""
    places = np.meshgrid(np.arange(grid.columns) + 0.5, np.arange(grid.rows) + 0.5)
    centres = np.stack(places, axis=-1).reshape(-1, 2)
    rest = np.array([grid.columns, grid.rows]) - centres
    edges = in_merge_order(np.concatenate([centres, rest], axis=1), grid)
    return torch.from_numpy(edges / EDGE_UNIT).float()


def shares_of(lengths: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[B, N, 6] lengths → [B, N, 1]: the mean side of a patch's thing by the picture's shorter
    side; NaN where there is none."""
    sides = (lengths[..., 2:4] - lengths[..., :2]).mean(dim=-1, keepdim=True)
    return sides / min(grid.rows, grid.columns) * BESIDE_PICTURE


def _distance(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of those that are wanted: not NaN."""
    known = ~wanted.isnan()
    return smooth_l1_loss(given[known], wanted[known])
