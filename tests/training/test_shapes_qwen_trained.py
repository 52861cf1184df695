"""What ships of training/shapes_qwen: small, right about held-out scenes, and in need of its parts.

The bundles made of it are measured in tests/test_shapes_qwen.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from tests.shapes_qwen import MODELS
from tests.thorough import cells
from training.shapes_qwen import evaluate
from training.shapes_qwen.checkpoint import read_checkpoint
from training.shapes_qwen.prompts import train_tokenizer
from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle

TASKS = 100  # captions, and as many questions


@pytest.mark.parametrize("name", MODELS)
def test_what_ships(name: str) -> None:
    """Small, with a licence, and with the tokenizer that the recipe trains."""
    folder = builtin_models()[name]
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    shipped = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert shipped.to_str() == train_tokenizer(0).to_str()


@pytest.mark.parametrize("step", cells(5, rest=(1,)))
@pytest.mark.parametrize("name", MODELS)
def test_it_is_right_and_each_part_is_worth_something(
    name: str, step: int, built_in: Callable[[str], Bundle]
) -> None:
    """M-RoPE, and DeepStack where there is any: without them fewer answers are right."""
    folder = builtin_models()[name]
    family, model, tokenizer = read_checkpoint(folder)
    assert family.model == name
    tasks = evaluate.held_out_tasks(TASKS)
    given = evaluate.answers_by_torch(family, model, tokenizer, tasks)
    assert evaluate.share(tasks[:TASKS], given[:TASKS]) >= evaluate.CAPTIONS_AT_LEAST
    assert evaluate.share(tasks[TASKS:], given[TASKS:]) >= evaluate.QUESTIONS_AT_LEAST
    assert evaluate.answers_by_vlmport(built_in(name).folder, tasks[::step]) == given[::step]
    lost = evaluate.costs(family, model, tokenizer, tasks, given)
    assert lost.keys() == evaluate.switches(family).keys()
    # How much is a matter of thousands: `python -m training.shapes_qwen.evaluate`.
    assert all(points > 0 for points in lost.values()), lost
