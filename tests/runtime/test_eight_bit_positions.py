"""Rows that step one by one, as 8 bits want it, with positions on three axes.

Such a decoder rounds activations by all rows of a call, so each row steps by itself; where it
stands hangs on its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.runtime import toy
from vlmport.exporter import export
from vlmport.runtime.model import VLM

TOKENS = 12
WRITERS: dict[str, Callable[..., Path]] = {"qwen2_5_vl": write_qwen2_5, "qwen3_vl": write_qwen3}


@pytest.fixture(scope="module", params=WRITERS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = WRITERS[request.param](folder / "checkpoint", seed=1)
    return VLM.open(export(checkpoint, folder / "bundle", precisions="q8"), threads=1)


def user(text: str, pictures: int = 0) -> dict[str, Any]:
    parts = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


ASKED: list[tuple[dict[str, Any], list[np.ndarray]]] = [
    (user("What is this?", 1), [toy.picture(0, 90, 120)]),
    (user("Which of them is larger?", 2), [toy.picture(1, 60, 30), toy.picture(2, 40, 150)]),
    (user("Why?"), []),
]


def test_a_batch_says_what_each_of_its_requests_says_alone(vlm: VLM) -> None:
    decoding = vlm.preparer.decoding({"max_new_tokens": TOKENS})

    def prompts() -> Iterator[Any]:
        for message, images in ASKED:
            yield vlm.preparer.prepare([message], images, decoding)

    assert vlm.components.decoder.row_by_row
    assert vlm.components.decoder.positions_rank == 3
    made = list(prompts())
    offsets = [one.request.rope_delta for one in made]
    assert offsets[0] != offsets[1] < offsets[2] == 0
    together = vlm._run(made)
    alone = [vlm._run([one])[0] for one in prompts()]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert all(len(set(one.token_ids)) > 3 for one in alone), "tokens that tell nothing apart"


def test_captions_of_unequal_pictures(vlm: VLM) -> None:
    pictures = [images[0] for _, images in ASKED if images]
    together = vlm.caption(pictures, max_new_tokens=TOKENS)
    alone = [vlm.caption(one, max_new_tokens=TOKENS) for one in pictures]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert together[0].counts["prompt_tokens"] != together[1].counts["prompt_tokens"]
