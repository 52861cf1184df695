"""Exact match of a checkpoint: `python -m training.shapes_smolvlm.evaluate FOLDER`.

Held-out scenes, one question at a time and by itself, answered greedily by PyTorch from the weights
as stored. Each kind of question is counted alone, with pictures whole and in tiles; questions
about two pictures are those that only two can have.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Idefics3ForConditionalGeneration

from training.fitting import normalise
from training.questions import Exchange, describe, questions, scene_pair, which
from training.shapes.scenes import draw, random_scene
from training.shapes_smolvlm.checkpoint import MAX_NEW_TOKENS, read_checkpoint
from training.shapes_smolvlm.prompts import END, image_text, render, tiles

HELD_OUT_SEED = 20_000
SHOWN_MISTAKES = 10
CAPTIONS_AT_LEAST, QUESTIONS_AT_LEAST = 95.0, 90.0


@dataclass(frozen=True)
class Task:
    """One question about one or two pictures."""

    exchange: Exchange
    images: tuple[Image.Image, ...]
    split: bool


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Task]:
    """`count` captions, and as many questions, a quarter of them about two pictures.

    Every second one has its pictures in tiles. The seed is one that training never uses.
    """
    rng = random.Random(f"{seed}-smolvlm-held-out")
    tasks = []
    for number in range(count):
        scenes = [random_scene(rng)]
        tasks.append((describe(scenes[0], rng), scenes))
        if number % 4 == 3:
            scenes = scene_pair(rng)
            asked = which(scenes, rng) + questions(scenes[1], rng, " in the second image")
        else:
            asked = questions(scenes[0], rng)
        kind = rng.choice(sorted({one.kind for one in asked}))
        tasks.append((rng.choice([one for one in asked if one.kind == kind]), scenes))
    return [
        Task(
            replace(exchange, images=tuple(range(len(scenes)))),
            tuple(draw(scene) for scene in scenes),
            number // 2 % 2 == 1,
        )
        for number, (exchange, scenes) in enumerate(tasks)
    ]


@torch.no_grad()
def answers_by_torch(
    model: Idefics3ForConditionalGeneration, tokenizer: Tokenizer, tasks: Sequence[Task]
) -> list[str]:
    """The greedy answer to each task, in batches of prompts of one length."""
    prepared: dict[tuple[int, int], list[int]] = {}
    inputs = []
    for number, task in enumerate(tasks):
        cut = [tiles(image, split=task.split) for image in task.images]
        pixels = normalise(torch.cat([torch.from_numpy(one[0].copy()) for one in cut]))
        parts = render([task.exchange], [image_text(*one[1:]) for one in cut])
        text = "".join(part for part, _ in parts[:2])  # up to the answer
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        inputs.append((ids, pixels))
        prepared.setdefault((len(ids), len(pixels)), []).append(number)
    answers = [""] * len(tasks)
    for numbers in prepared.values():
        for start in range(0, len(numbers), 32):
            batch = numbers[start : start + 32]
            made = model.generate(
                input_ids=torch.stack([inputs[n][0] for n in batch]),
                pixel_values=torch.stack([inputs[n][1] for n in batch]),
                attention_mask=torch.ones(len(batch), len(inputs[batch[0]][0]), dtype=torch.long),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.token_to_id(END),
                pad_token_id=0,
            )
            for n, ids in zip(batch, made[:, len(inputs[batch[0]][0]) :].tolist(), strict=True):
                answers[n] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def table(tasks: Sequence[Task], given: Sequence[str]) -> tuple[str, float, float]:
    """Lines of kind, right, asked; and the percentages of captions and of questions."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for task, answer in zip(tasks, given, strict=True):
        kind = task.exchange.kind
        group = "caption" if kind == "caption" else "question"
        names = [kind, f"all {group}s", f"{group}s, {'tiles' if task.split else 'whole'}"]
        names += [f"{group}s, {len(task.images)} pictures"] if len(task.images) > 1 else []
        for name in names:
            asked[name] += 1
            right[name] += answer == task.exchange.answer
    lines = [
        f"{name:22} {right[name]:5} of {asked[name]:5}  {100 * right[name] / asked[name]:5.1f} %"
        for name in sorted(asked)
    ]
    percent = {name: 100 * right[name] / asked[name] for name in asked}
    return "\n".join(lines), percent["all captions"], percent["all questions"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=1000, help="captions, and as many questions")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    arguments = parser.parse_args()
    tasks = held_out(arguments.tasks, arguments.seed)
    model, tokenizer = read_checkpoint(arguments.folder)
    given = answers_by_torch(model, tokenizer, tasks)
    wrong = [(t, a) for t, a in zip(tasks, given, strict=True) if a != t.exchange.answer]
    for task, answer in wrong[:SHOWN_MISTAKES]:
        print(f"{task.exchange.question}\nright: {task.exchange.answer}\ngiven: {answer}\n")
    lines, captions, asked = table(tasks, given)
    print(lines)
    return 0 if captions >= CAPTIONS_AT_LEAST and asked >= QUESTIONS_AT_LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
