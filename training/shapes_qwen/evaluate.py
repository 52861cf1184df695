"""Exact match of a checkpoint: `python -m training.shapes_qwen.evaluate FOLDER`.

Captions of held-out scenes on canvases of many sizes, and as many questions, every fourth about
two pictures of different sizes; each asked by itself and answered greedily by transformers from
the weights as stored, or by vlmport in fp32, which is faster and by `vlmport verify` has the same
tokens. Then all of them or a part again by transformers with something switched off, to see what
it is worth:

- M-RoPE: image tokens count on like text, in one row;
- DeepStack (Qwen3-VL): the lanes are zero.

The exit code is 0 where captions and questions reach their marks and each switch costs enough.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training.questions import Exchange, conversation, describe
from training.shapes.scenes import Scene, draw, random_scene
from training.shapes_qwen.checkpoint import MAX_NEW_TOKENS, read_checkpoint
from training.shapes_qwen.families import Family
from training.shapes_qwen.model import QwenModel
from training.shapes_qwen.pictures import Grid, grid_of, patches, random_canvas, resized
from training.shapes_qwen.prompts import IMAGE, PAD, image_text, render
from vlmport import load
from vlmport.builtin.scenes import HELD_OUT_SEED

SHOWN_MISTAKES = 20
CAPTIONS_AT_LEAST, QUESTIONS_AT_LEAST = 95.0, 90.0
COSTS_AT_LEAST = 1.0  # points of all answers, for each switch: 20 of 2,000
BATCH_SIZE = 32
FEW_TOKENS = 35  # a picture has 30 to 42


@dataclass(frozen=True)
class Task:
    """One question and its scenes."""

    exchange: Exchange
    scenes: tuple[Scene, ...]

    @property
    def is_caption(self) -> bool:
        return self.exchange.kind == "caption"

    @property
    def grids(self) -> list[Grid]:
        return [grid_of(scene.width, scene.height) for scene in self.scenes]


def held_out_tasks(count: int, seed: int = HELD_OUT_SEED) -> list[Task]:
    """`count` captions, then as many questions; the seed is one that training never uses."""
    rng = random.Random(f"{seed}-qwen-held-out")
    scenes = [random_scene(rng, canvas=random_canvas(rng)) for _ in range(count)]
    captions = [Task(replace(describe(one, rng), images=(0,)), (one,)) for one in scenes]
    return captions + [_question(rng, 2 if number % 4 == 3 else 1) for number in range(count)]


def _question(rng: random.Random, pictures: int) -> Task:
    """Kinds are drawn evenly, but for `which`, that only pairs have."""
    counts = (1, 2) if pictures == 2 else (1, 2, 3)
    scenes = [random_scene(rng, rng.choice(counts), random_canvas(rng)) for _ in range(pictures)]
    (asked,) = conversation(scenes, rng, 1, {"caption": 0.0, "which": 3.0})
    return Task(asked, tuple(scenes))


@torch.no_grad()
def answers_by_torch(
    family: Family, model: QwenModel, tokenizer: Tokenizer, tasks: Sequence[Task]
) -> list[str]:
    """The greedy answer to each task; prompts of about one length in a batch."""
    prompts = [_prompt(family, tokenizer, task) for task in tasks]
    order = sorted(range(len(tasks)), key=lambda n: len(prompts[n]))
    answers = [""] * len(tasks)
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        made = model.generate(
            **_inputs(family, tokenizer, [tasks[n] for n in batch], [prompts[n] for n in batch]),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,  # it stops where the folder's generation_config.json says
        )
        length = max(len(prompts[n]) for n in batch)
        for n, ids in zip(batch, made[:, length:].tolist(), strict=True):
            answers[n] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def answers_by_vlmport(folder: Path, tasks: Sequence[Task]) -> list[str]:
    """The same by the bundle of a checkpoint, in fp32, one by one."""
    answers = []
    with load(folder, precision="fp32") as model:
        for task in tasks:
            parts = [{"type": "image"} for _ in task.scenes]
            parts.append({"type": "text", "text": task.exchange.question})
            images = [draw(scene) for scene in task.scenes]
            answers.append(model.generate([{"role": "user", "content": parts}], images).text)
    return answers


def _prompt(family: Family, tokenizer: Tokenizer, task: Task) -> list[int]:
    parts = render([task.exchange], [image_text(grid) for grid in task.grids], family)
    spoken = next(number for number, (_, spoken) in enumerate(parts) if spoken)
    text = "".join(part for part, _ in parts[:spoken])
    return tokenizer.encode(text, add_special_tokens=False).ids


def _inputs(
    family: Family, tokenizer: Tokenizer, tasks: Sequence[Task], prompts: Sequence[list[int]]
) -> dict[str, torch.Tensor]:
    """What the processor gives for a ragged batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.token_to_id(PAD))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    pictures = [torch.from_numpy(resized(draw(s)).copy()) for task in tasks for s in task.scenes]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == tokenizer.token_to_id(IMAGE)).int(),
        "pixel_values": torch.cat([patches(one[None], family)[0] for one in pictures]),
        "image_grid_thw": torch.tensor([[1, *grid] for task in tasks for grid in task.grids]),
    }


@contextmanager
def without_mrope(model: QwenModel) -> Iterator[None]:
    """Positions [3, B, S] count on through pictures, the same in all three."""

    def plain(
        input_ids: torch.Tensor, *, attention_mask: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return counted.expand(3, -1, -1), torch.zeros(len(input_ids), 1, dtype=torch.long)

    model.model.get_rope_index = plain
    try:
        yield
    finally:
        del model.model.get_rope_index


@contextmanager
def without_deepstack(model: QwenModel) -> Iterator[None]:
    """The tower's further features are zero."""

    def silence(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        output.deepstack_features = [torch.zeros_like(lane) for lane in output.deepstack_features]
        return output

    hook = model.model.visual.register_forward_hook(silence)
    try:
        yield
    finally:
        hook.remove()


def switches(family: Family) -> dict[str, Callable[[QwenModel], Any]]:
    """What can be switched off, by name."""
    known = {"M-RoPE": without_mrope}
    return {**known, "DeepStack": without_deepstack} if family.lanes else known


def share(tasks: Sequence[Task], given: Sequence[str]) -> float:
    """Percent of the answers that are right to the letter."""
    right = [a == task.exchange.answer for task, a in zip(tasks, given, strict=True)]
    return 100 * sum(right) / len(right)


def table(tasks: Sequence[Task], given: Sequence[str]) -> str:
    """A row for each kind; columns for few and many tokens a picture, for two, and for all."""
    asked: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    columns = [f"1, to {FEW_TOKENS} tokens", f"1, over {FEW_TOKENS}", "2 pictures", "all"]
    for task, answer in zip(tasks, given, strict=True):
        many = 2 if len(task.grids) > 1 else int(task.grids[0].tokens > FEW_TOKENS)
        group = "all captions" if task.is_caption else "all questions"
        for row in {task.exchange.kind, group}:
            for column in (columns[many], "all"):
                asked[row, column] += 1
                right[row, column] += answer == task.exchange.answer
    lines = [f"{'':14}" + "".join(f"{column:>18}" for column in columns)]
    for row in sorted({row for row, _ in asked}):
        cells = [_cell(right[row, column], asked[row, column]) for column in columns]
        lines.append(f"{row:14}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _cell(right: int, asked: int) -> str:
    return f"{right}/{asked} {100 * right / asked:5.1f} %" if asked else "-"


def costs(
    family: Family,
    model: QwenModel,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    given: Sequence[str],
) -> dict[str, float]:
    """Points of exact match that each switch costs on the tasks; prints them by group."""
    lost = {}
    groups = {
        "captions": [n for n, task in enumerate(tasks) if task.is_caption],
        "questions": [n for n, task in enumerate(tasks) if not task.is_caption],
    }
    for name, switch in switches(family).items():
        with switch(model):
            without = answers_by_torch(family, model, tokenizer, tasks)
        for group, numbers in groups.items():
            some = [tasks[n] for n in numbers]
            before = share(some, [given[n] for n in numbers])
            after = share(some, [without[n] for n in numbers])
            print(f"without {name}, {len(some)} {group}: {before:.1f} % → {after:.1f} %")
        lost[name] = share(tasks, given) - share(tasks, without)
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=1000, help="captions, and as many questions")
    parser.add_argument("--switched", type=int, default=1000, help="of each, with a part off")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--by-vlmport", action="store_true", help="not by transformers: faster")
    arguments = parser.parse_args()
    count, few = arguments.tasks, min(arguments.tasks, arguments.switched)
    tasks = held_out_tasks(count, arguments.seed)
    family, model, tokenizer = read_checkpoint(arguments.folder)
    if arguments.by_vlmport:
        given = answers_by_vlmport(arguments.folder, tasks)
    else:
        given = answers_by_torch(family, model, tokenizer, tasks)
    both = list(zip(tasks, given, strict=True))
    for task, answer in [one for one in both if one[0].exchange.answer != one[1]][:SHOWN_MISTAKES]:
        print(f"{task.exchange.question} {[grid.merged for grid in task.grids]}", file=sys.stderr)
        print(f"right: {task.exchange.answer}\ngiven: {answer}\n", file=sys.stderr)
    print(table(tasks, given))
    captions, questions = share(tasks[:count], given[:count]), share(tasks[count:], given[count:])
    print(f"exact match: captions {captions:.1f} %, questions {questions:.1f} %, {count} of each")
    some = [*range(few), *range(count, count + few)]
    lost = costs(family, model, tokenizer, [tasks[n] for n in some], [given[n] for n in some])
    good = captions >= CAPTIONS_AT_LEAST and questions >= QUESTIONS_AT_LEAST
    return 0 if good and all(points >= COSTS_AT_LEAST for points in lost.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
