"""The questions of `vlmport.builtin.questions`, and conversations that only training has."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmport.builtin.questions import (
    CAPTION_QUESTIONS,
    NUMBERS,
    ORDINALS,
    RELATIONS,
    Exchange,
    all_about,
    conversation,
    describe,
    draw,
    held_out_questions,
    questions,
    scene_pair,
    which,
)
from vlmport.builtin.scenes import Scene

__all__ = [
    "CAPTION_QUESTIONS",
    "NUMBERS",
    "ORDINALS",
    "RELATIONS",
    "Exchange",
    "conversation",
    "describe",
    "growing_conversation",
    "held_out_questions",
    "questions",
    "scene_pair",
    "which",
]


def growing_conversation(
    scenes: Sequence[Scene],
    rng: random.Random,
    turns: int,
    weights: Mapping[str, float] | None = None,
) -> list[Exchange]:
    """Draw a conversation about one image, to which a second one comes with a later question."""
    first, second = scenes
    turn = rng.randint(1, turns - 1)
    began = conversation([first], rng, turn, weights)
    asked = [describe(second, rng), *all_about(scenes, rng)]
    begins, *rest = draw(asked, rng, turns - turn, weights)
    # "this image" is the one that comes with the question.
    later = [begins, *(one for one in rest if one.kind != "caption")]
    return [*began, replace(later[0], images=(1,)), *later[1:]]
