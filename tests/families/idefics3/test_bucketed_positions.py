"""Buckets of fractions, against PyTorch's own operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmport.families.idefics3.bucketed_positions import PickedRows, bucketed_positions


def by_torch(patches: int, side: int) -> np.ndarray:
    """transformers' Idefics3VisionEmbeddings.forward for a tile that is whole."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(patches, dtype=torch.float32) * (1.0 / torch.tensor([patches]))
    bucket = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)
    return (bucket[:, None] * side + bucket).reshape(-1).numpy()


def test_every_number_of_patches() -> None:
    for side in range(1, 100):
        for patches in {side, side + 1, 2 * side, max(1, side // 2)}:
            np.testing.assert_array_equal(
                bucketed_positions(patches, side), by_torch(patches, side), f"{patches}, {side}"
            )


@pytest.mark.parametrize(
    ("side", "is_identity"), [(32, True), (26, True), (19, False), (31, False)]
)
def test_the_identity_is_no_rule(side: int, is_identity: bool) -> None:
    identity = np.arange(side * side)
    assert np.array_equal(bucketed_positions(side, side), identity) == is_identity


def test_rows_are_picked_when_they_are_read() -> None:
    class Table:
        name, shape, dtype = "table", (3, 2), "F32"

        def numpy(self) -> np.ndarray:
            return np.arange(6, dtype=np.float32).reshape(3, 2)

    picked = PickedRows(Table(), np.array([2, 0, 2, 1]))
    assert (picked.name, picked.shape, picked.dtype) == ("table", (4, 2), "F32")
    assert picked.numpy().tolist() == [[4, 5], [0, 1], [4, 5], [2, 3]]
