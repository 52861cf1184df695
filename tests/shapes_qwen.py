"""The built-in models of Qwen-VL's kinds, for the tests of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmport.builtin import builtin_models

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CAPTIONS: dict[str, str] = json.loads((EXAMPLES / "captions.json").read_text("utf-8"))
QUESTIONS: list[dict[str, Any]] = json.loads((EXAMPLES / "questions.json").read_text("utf-8"))

# Which of two pictures is meant, and what lies beside what, they do not know well enough to be held
# to it: training/shapes_qwen/README.md has the figures.
KNOWN = [one for one in QUESTIONS if not one["question"].startswith(("which", "what is "))]

MODELS = ("shapes-qwen3-vl", "shapes-qwen2.5-vl")


def kind(name: str) -> str:
    """The model type of one of MODELS."""
    return json.loads((builtin_models()[name] / "config.json").read_text())["model_type"]


def user(question: str, pictures: int) -> dict[str, Any]:
    """A message: so many pictures, then the question."""
    parts = [{"type": "image"} for _ in range(pictures)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def asked(question: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Messages and pictures of one of QUESTIONS."""
    pictures = [EXAMPLES / name for name in question["images"]]
    return [user(question["question"], len(pictures))], pictures
