"""The questions of `vlmport.builtin.questions`, under the name that the recipes know."""

from vlmport.builtin.questions import (
    CAPTION_QUESTIONS,
    NUMBERS,
    ORDINALS,
    RELATIONS,
    Exchange,
    conversation,
    describe,
    growing_conversation,
    held_out_questions,
    questions,
    scene_pair,
    which,
)

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
