"""Train a shapes model of a Qwen-VL kind and write its checkpoint:

`python -m training.shapes_qwen.train --family qwen3 OUT` (or `qwen2.5`).

1. `tower`, `again`: the vision tower answers dense questions at every patch. No words yet.
2. `notes`: the language model, which begins as that of shapes-smolvlm, answers from *notes*, one
   vector for each image token: the words for what its four patches show, and how many patches
   their thing is wide and high. How large that is depends on the picture, whose size only the
   positions tell. No pictures yet.
3. `join`: both frozen, the mergers between them learn.
4. `chat`: all weights learn to answer from one or two pictures.
5. `captions`: short conversations, most of them a caption, while the tower goes on with its dense
   questions: what it learns last, shape and size, is what captions still get wrong.
6. `scale`: the same, and each patch tells how far it is from the picture's four edges and how large
   its thing is beside the picture. Before, sizes are told by patches alone: a medium square in
   12 x 12 patches is as wide as a large one in 8 x 16.
7. `finish`: the same on pictures of fewer grids, those that the shipped processor makes.

Each stage is seeded and saves its result in OUT-stages, so an interrupted run takes up at the
stage where it stopped. Set OMP_WAIT_POLICY=passive where other work shares the cores.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from training.fitting import Stage, fit, take_up
from training.shapes.batches import CELLS, PATCH_QUESTIONS, note_ids
from training.shapes_qwen.batches import Batch, Shown, conversations
from training.shapes_qwen.checkpoint import token_ids, write_checkpoint
from training.shapes_qwen.dense import DenseHeads
from training.shapes_qwen.families import FAMILIES, Family
from training.shapes_qwen.language import fit_lengths, load_language
from training.shapes_qwen.model import HIDDEN, Chat, Seen, model_config
from training.shapes_qwen.pictures import MERGE, SHIPPED, WIDE, Canvases
from training.shapes_qwen.prompts import train_tokenizer

SMOLVLM = Path(__file__).parents[2] / "src/vlmport/builtin/shapes-smolvlm"
TURNS = 5
EXTENTS, QUARTERS = 64, 4  # widths and heights that a note can tell, in quarters of a patch
# Which of PATCH_QUESTIONS a note answers in the token. The size is left out: the extents stand for
# it. Where there are lanes, they say some of it again.
TOLD = ("background", "shape", "colour", "relation")
ALSO = (("colour",), ("shape",))

TOWER = Stage(steps=1500, batch_size=32, rate=1e-3)
AGAIN = Stage(steps=1000, batch_size=32, rate=1e-3)
NOTES = Stage(steps=400, batch_size=32, rate=1.5e-3)
JOIN = Stage(steps=200, batch_size=32, rate=2e-3)
CHAT = Stage(steps=1200, batch_size=32, rate=1e-3, tower_rate=4e-4)
CAPTIONS = Stage(steps=2000, batch_size=32, rate=1e-3, tower_rate=8e-4)
SCALE = Stage(steps=2000, batch_size=32, rate=7e-4, tower_rate=7e-4)
FINISH = Stage(steps=2000, batch_size=32, rate=5e-4, tower_rate=5e-4)
KINDS = {"caption": 6.0, "which": 6.0, "beside": 2.0}  # from `captions` on; others 1
SHORT_TURNS = 2
DENSE = 0.5  # weight of the dense questions beside the words, from `captions` on
ALONE = 200  # calls, a tenth of the steps at most: new heads would pull the tower anywhere


class Notes(nn.Module):
    """What a note says: [B, N, 6] answers and [B, N, 22] geometry → [B, T, D] and the lanes."""

    def __init__(self, model: Chat, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.extents = nn.ModuleList(nn.Embedding(EXTENTS, HIDDEN) for _ in range(2))
        for table in self.extents:
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, shown: Shown) -> list[torch.Tensor]:
        words = note_ids(shown.answers.flatten(0, 1)[None], self.tokenizer)[0]
        said = self.model.text.embed_tokens(words) * (words != 0)[..., None]
        names = list(PATCH_QUESTIONS)
        told = [
            said[:, [names.index(name) for name in group]].sum(dim=1)
            for group in (TOLD, *ALSO[: self.model.family.lanes])
        ]
        told[0] = told[0] + self._measured(shown.geometry[..., CELLS:].flatten(0, 1))
        B = len(shown.answers)
        return [part.view(B, -1, MERGE**2, HIDDEN).sum(dim=2) / MERGE for part in told]

    def _measured(self, lengths: torch.Tensor) -> torch.Tensor:
        """[B·N, 6] → [B·N, D]: width and height of the patch's thing, nothing where none is."""
        here = ~lengths[:, :1].isnan()
        sides = (lengths[:, 2:4] - lengths[:, :2]).nan_to_num() * QUARTERS
        steps = sides.round().long().clamp(0, EXTENTS - 1)
        across, along = (table(steps[:, n]) for n, table in enumerate(self.extents))
        return (across + along) * here


def train_notes(
    stage: Stage, notes: Notes, tokenizer: Tokenizer, seed: int, language: Path
) -> None:
    """Stage 2: answers from notes in the places of the features."""
    model = notes.model
    load_language(model, tokenizer, language)

    def loss(batch: Batch) -> torch.Tensor:
        pictures = [notes(shown) for shown in batch.shown]
        features, *lanes = (torch.cat(parts, dim=1) for parts in zip(*pictures, strict=True))
        return model.loss(batch, features, lanes)

    weights = [*model.spoken(), *notes.extents.parameters()]
    batches = _batches("notes", stage, model, tokenizer, seed, turns=TURNS, drawn=False)
    fit_lengths(model, lambda: loss(next(iter(batches))))
    fit("notes", stage, [{"params": weights}], batches, loss)


def train_tower(
    name: str, stage: Stage, model: Chat, tokenizer: Tokenizer, seed: int, questions: float
) -> None:
    """Stage 1: `PATCH_QUESTIONS` answered by one linear head from each patch's feature.

    Args:
        questions: weight of their mean loss beside those of the cells and the lengths.
    """
    heads = DenseHeads(questions)

    def loss(batch: Batch) -> torch.Tensor:
        (shown,) = batch.shown
        return heads(model.see(shown.pixels).patches, shown)

    norm = model.tower.merger.norm if model.family.lanes else model.tower.merger.ln_q
    learnt = [*_tower(model), *norm.parameters(), *heads.parameters()]
    batches = _batches(name, stage, model, tokenizer, seed, turns=0, drawn=True)
    fit(name, stage, [{"params": learnt}], batches, loss)


def train_pictures(
    name: str, stage: Stage, model: Chat, tokenizer: Tokenizer, seed: int, *, frozen: bool
) -> None:
    """Stages 3 and 4: answers from pictures; frozen but for the mergers, or all weights."""
    mergers, text, tower = model.mergers(), model.spoken(), _tower(model)
    for weight in tower + text:
        weight.requires_grad_(not frozen)
    groups = [{"params": mergers}]
    if not frozen:
        groups = [{"params": mergers + text}, {"params": tower, "lr": stage.tower_rate}]
    batches = _batches(name, stage, model, tokenizer, seed, turns=TURNS, drawn=True)
    fit(name, stage, groups, batches, lambda batch: _spoken_loss(model, batch, _seen(model, batch)))


def train_captions(
    name: str,
    stage: Stage,
    model: Chat,
    tokenizer: Tokenizer,
    seed: int,
    *,
    beside_picture: bool,
    canvases: Canvases,
) -> None:
    """Stages 5 to 7: words and dense answers of the same pictures, all weights."""
    mergers, tower = model.mergers(), _tower(model)
    alone = min(ALONE, stage.steps // 10) if beside_picture else 0
    heads = DenseHeads(6.0, beside_picture=beside_picture, alone=alone)
    for weight in tower + model.spoken():
        weight.requires_grad_(True)

    def loss(batch: Batch) -> torch.Tensor:
        seen = _seen(model, batch)
        dense = [heads(one.patches, shown) for one, shown in zip(seen, batch.shown, strict=True)]
        return _spoken_loss(model, batch, seen) + DENSE * torch.stack(dense).mean()

    words = [*mergers, *model.spoken(), *heads.parameters()]
    groups = [{"params": words}, {"params": tower, "lr": stage.tower_rate}]
    batches = _batches(
        name,
        stage,
        model,
        tokenizer,
        seed,
        turns=SHORT_TURNS,
        drawn=True,
        kinds=KINDS,
        canvases=canvases,
    )
    fit(name, stage, groups, batches, loss)


def _tower(model: Chat) -> list[nn.Parameter]:
    """Its weights without the mergers."""
    mergers = {id(weight) for weight in model.mergers()}
    return [weight for weight in model.tower.parameters() if id(weight) not in mergers]


def _seen(model: Chat, batch: Batch) -> list[Seen]:
    return [model.see(shown.pixels) for shown in batch.shown]


def _spoken_loss(model: Chat, batch: Batch, seen: Sequence[Seen]) -> torch.Tensor:
    features = torch.cat([one.tokens for one in seen], dim=1)
    lanes = [torch.cat(lane, dim=1) for lane in zip(*(one.lanes for one in seen), strict=True)]
    return model.loss(batch, features, lanes)


def _batches(
    name: str,
    stage: Stage,
    model: Chat,
    tokenizer: Tokenizer,
    seed: int,
    *,
    turns: int,
    drawn: bool,
    kinds: Mapping[str, float] | None = None,
    canvases: Canvases = WIDE,
) -> Iterable[Batch]:
    steps, size = stage.steps, stage.batch_size
    label = f"{seed}-{model.family.name}-{name}"
    return conversations(
        label,
        steps,
        size,
        tokenizer,
        model.family,
        turns=turns,
        drawn=drawn,
        kinds=kinds,
        canvases=canvases,
    )


def train(out: Path, family: Family, seed: int, scale: float, language: Path) -> None:
    """All stages; `scale` shortens each of them, for a trial.

    Args:
        language: a folder of shapes-smolvlm, whose language model is the beginning of ours.
    """
    lengths = {
        "tower": TOWER,
        "again": AGAIN,
        "notes": NOTES,
        "join": JOIN,
        "chat": CHAT,
        "captions": CAPTIONS,
        "scale": SCALE,
        "finish": FINISH,
    }
    stages = {
        name: replace(stage, steps=max(1, round(stage.steps * scale)))
        for name, stage in lengths.items()
    }
    work = out.with_name(f"{out.name}-stages")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    model = Chat(family, model_config(family, token_ids(tokenizer)))
    notes = Notes(model, tokenizer)

    def dense(name: str, questions: float) -> None:
        train_tower(name, stages[name], model, tokenizer, seed, questions)

    def pictures(name: str, *, frozen: bool) -> None:
        train_pictures(name, stages[name], model, tokenizer, seed, frozen=frozen)

    def captions(name: str, canvases: Canvases, *, beside_picture: bool) -> None:
        train_captions(
            name,
            stages[name],
            model,
            tokenizer,
            seed,
            beside_picture=beside_picture,
            canvases=canvases,
        )

    runs: dict[str, Callable[[], None]] = {
        "tower": lambda: dense("tower", 1.0),
        # A second cosine from a high rate, for what is learnt late in the first one: shapes.
        "again": lambda: dense("again", 6.0),
        "notes": lambda: train_notes(stages["notes"], notes, tokenizer, seed, language),
        "join": lambda: pictures("join", frozen=True),
        "chat": lambda: pictures("chat", frozen=False),
        "captions": lambda: captions("captions", WIDE, beside_picture=False),
        "scale": lambda: captions("scale", WIDE, beside_picture=True),
        "finish": lambda: captions("finish", SHIPPED, beside_picture=True),
    }
    done: list[Stage] = []
    for name, run in runs.items():
        # Results of another seed, of other lengths or after other stages are not taken up.
        done.append(stages[name])
        recipe = hashlib.sha256(repr((seed, done)).encode()).hexdigest()[:8]
        take_up(model, work / f"{name}-{recipe}.pt", seed, run)
        print(f"{out}: {write_checkpoint(out, family, model.vlm, tokenizer)} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--language", type=Path, default=SMOLVLM, help="shapes-smolvlm's folder")
    arguments = parser.parse_args()
    family = FAMILIES[arguments.family]
    train(arguments.out, family, arguments.seed, arguments.scale, arguments.language)


if __name__ == "__main__":
    main()
