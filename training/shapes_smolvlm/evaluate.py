"""Exact match of a checkpoint: `python -m training.shapes_smolvlm.evaluate FOLDER`.

Each picture or pair of pictures is asked about once, in a conversation of its own, and answered
greedily by PyTorch from the weights as stored:

- the caption of each held-out scene of `vlmport.builtin.scenes`,
- as many questions of `vlmport.builtin.questions`, every fourth about two pictures.

Half of each have their pictures in tiles. Each kind of question is counted by itself.
`vlmport eval` measures bundles on the same scenes and questions.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Idefics3ForConditionalGeneration

from training.fitting import normalise
from training.questions import Exchange, describe, held_out_questions
from training.shapes.scenes import Scene, draw, held_out
from training.shapes_smolvlm.batches import FORMS, Form
from training.shapes_smolvlm.checkpoint import MAX_NEW_TOKENS, read_checkpoint
from training.shapes_smolvlm.prompts import END, PAD, image_text, render, tiles
from vlmport.builtin.scenes import HELD_OUT_SEED

SHOWN_MISTAKES = 20
CAPTIONS_AT_LEAST, QUESTIONS_AT_LEAST = 95.0, 90.0
BATCH_SIZE = 32


@dataclass(frozen=True)
class Task:
    """One question, its scenes, and how they are shown."""

    exchange: Exchange
    scenes: tuple[Scene, ...]
    form: Form

    @property
    def is_caption(self) -> bool:
        return self.exchange.kind == "caption"


def held_out_tasks(count: int, seed: int = HELD_OUT_SEED) -> list[Task]:
    """`count` captions, then as many questions."""
    rng = random.Random(f"{seed}-held-out-captions")
    captions = [
        Task(replace(describe(scene, rng), images=(0,)), (scene,), Form(1, number % 2 == 1))
        for number, scene in enumerate(held_out(count, seed))
    ]
    # One in four has two pictures, so that pairs of fours alternate.
    asked = [
        Task(exchange, tuple(scenes), Form(len(scenes), number // 4 % 2 == 1))
        for number, (exchange, scenes) in enumerate(held_out_questions(count, seed))
    ]
    return captions + asked


@torch.no_grad()
def answers_by_torch(
    model: Idefics3ForConditionalGeneration, tokenizer: Tokenizer, tasks: Sequence[Task]
) -> list[str]:
    """The greedy answer to each task, in batches of prompts of one length."""
    alike: dict[tuple[int, ...], list[int]] = {}
    inputs = []
    for number, task in enumerate(tasks):
        inputs.append(_inputs(task, tokenizer))
        alike.setdefault((len(inputs[-1][0]), len(inputs[-1][1])), []).append(number)
    answers = [""] * len(tasks)
    for (length, _), numbers in alike.items():
        for start in range(0, len(numbers), BATCH_SIZE):
            batch = numbers[start : start + BATCH_SIZE]
            made = model.generate(
                input_ids=torch.stack([inputs[n][0] for n in batch]),
                pixel_values=torch.stack([normalise(inputs[n][1]) for n in batch]),
                attention_mask=torch.ones(len(batch), length, dtype=torch.long),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.token_to_id(END),
                pad_token_id=tokenizer.token_to_id(PAD),
            )
            for n, ids in zip(batch, made[:, length:].tolist(), strict=True):
                answers[n] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def _inputs(task: Task, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt's ids [S] and all tiles [N, 96, 96, 3] uint8 of a task."""
    cut = [tiles(draw(scene), split=task.form.split) for scene in task.scenes]
    parts = render([task.exchange], [image_text(*one[1:]) for one in cut])
    text = "".join(part for part, _ in parts[:2])  # up to the answer
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    return ids, torch.from_numpy(np.concatenate([one[0] for one in cut]))


def share(tasks: Sequence[Task], given: Sequence[str]) -> float:
    """Percent of the answers that are right to the letter."""
    right = [a == task.exchange.answer for task, a in zip(tasks, given, strict=True)]
    return 100 * sum(right) / len(right)


def table(tasks: Sequence[Task], given: Sequence[str]) -> str:
    """A row for each kind, a column for each form: right of asked."""
    asked: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    for task, answer in zip(tasks, given, strict=True):
        group = "all captions" if task.is_caption else "all questions"
        for row in {task.exchange.kind, group}:
            for column in (_title(task.form), "all"):
                asked[row, column] += 1
                right[row, column] += answer == task.exchange.answer
    columns = [*map(_title, FORMS), "all"]
    lines = [f"{'':14}" + "".join(f"{column:>18}" for column in columns)]
    for row in sorted({row for row, _ in asked}):
        cells = [_cell(right[row, column], asked[row, column]) for column in columns]
        lines.append(f"{row:14}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _title(form: Form) -> str:
    return f"{form.images} {'in tiles' if form.split else 'whole'}"


def _cell(right: int, asked: int) -> str:
    return f"{right}/{asked} {100 * right / asked:5.1f} %" if asked else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=1000, help="captions, and as many questions")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    arguments = parser.parse_args()
    tasks = held_out_tasks(arguments.tasks, arguments.seed)
    model, tokenizer = read_checkpoint(arguments.folder)
    given = answers_by_torch(model, tokenizer, tasks)
    both = list(zip(tasks, given, strict=True))
    for task, answer in [one for one in both if one[0].exchange.answer != one[1]][:SHOWN_MISTAKES]:
        print(f"{_title(task.form)}: {task.exchange.question}", file=sys.stderr)
        print(f"right: {task.exchange.answer}\ngiven: {answer}\n", file=sys.stderr)
    print(table(tasks, given))
    count = arguments.tasks
    captions, questions = share(tasks[:count], given[:count]), share(tasks[count:], given[count:])
    print(f"exact match: captions {captions:.1f} %, questions {questions:.1f} %, {count} of each")
    return 0 if captions >= CAPTIONS_AT_LEAST and questions >= QUESTIONS_AT_LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
