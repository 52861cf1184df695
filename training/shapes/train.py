"""Train the shapes captioner and write its checkpoint: `python -m training.shapes.train OUT`.

distilvit2 joins a pretrained SigLIP to a pretrained SmolLM. Neither exists at this size, so the
first three stages make their small counterparts; the last is distilvit2's own training:

1. `language`: a byte-level BPE tokenizer and a small Llama learn captions alone.
2. `notes`: the same Llama learns to use a context, which SmolLM can and a model that has only
   seen captions cannot: the caption follows a *note*, 64 vectors, each the sum of the embeddings
   of the caption's words for what one patch shows. No pictures yet.
3. `tower`: the vision tower learns what every patch shows (shape, colour, size, background, place
   in the caption). Its answers' heads are thrown away.
4. `caption`: the language model is frozen; projection, LoRA on q, k, v and o projections and the
   vision tower learn to caption pictures.

Each stage is seeded and saves its result in OUT-stages, so an interrupted run takes up at the
stage where it stopped. Set OMP_WAIT_POLICY=passive where other work shares the cores.
"""

import argparse
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    smooth_l1_loss,
)
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from training.shapes.batches import (
    CELLS,
    IGNORE,
    LENGTHS,
    PATCH_QUESTIONS,
    Batch,
    caption_labels,
    drawn_batches,
    encode_captions,
    note_ids,
)
from training.shapes.checkpoint import (
    END,
    END_ID,
    PrefixVLM,
    checkpoint_config,
    wrap_lora,
    write_checkpoint,
)
from training.shapes.scenes import caption, random_scene

IMAGE_SIZE, PATCH_SIZE = 96, 12
GRID = IMAGE_SIZE // PATCH_SIZE
MAX_LENGTH = 30
LORA_R, LORA_ALPHA, LORA_DROPOUT = 16, 16, 0.0
EMA_DECAY = 0.998
NO_OBJECT_WEIGHT = 0.05

Item = TypeVar("Item")


@dataclass(frozen=True)
class Stage:
    """Length and peak learning rate of one stage; `tower_rate` where the tower has its own."""

    steps: int
    batch_size: int
    rate: float
    tower_rate: float | None = None


LANGUAGE = Stage(steps=500, batch_size=128, rate=2e-3)
NOTES = Stage(steps=1500, batch_size=32, rate=2e-3)
TOWER = Stage(steps=2000, batch_size=32, rate=1e-3)
CAPTION = Stage(steps=2000, batch_size=32, rate=2e-3, tower_rate=5e-4)


def vision_config() -> SiglipVisionConfig:
    """64 patches, no pooling head: the prefix is the 64 patch features."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )


def text_config(vocab_size: int) -> LlamaConfig:
    """Grouped-query heads and tied embeddings, like SmolLM."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=None,
    )


def new_tower() -> SiglipVisionModel:
    """Eager attention: PyTorch's CPU flash attention is ten times slower in bfloat16."""
    return SiglipVisionModel._from_config(vision_config(), attn_implementation="eager")


def new_language_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = text_config(tokenizer.get_vocab_size())
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE on 4,000 captions; id 0 is the one special token, as in SmolLM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"{seed}-tokenizer")
    tokenizer.train_from_iterator([caption(random_scene(rng)) for _ in range(4000)], trainer)
    return tokenizer


def train_language(stage: Stage, model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Stage 1: next caption token from the ones before it. The first is not predicted."""
    rng = random.Random(f"{seed}-language")

    def captions() -> Iterable[torch.Tensor]:
        for _ in range(stage.steps):
            scenes = [random_scene(rng) for _ in range(stage.batch_size)]
            yield encode_captions(tokenizer, [caption(scene) for scene in scenes])

    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return _token_loss(logits, caption_labels(ids)[:, 1:])

    fit("language", stage, [{"params": list(model.parameters())}], captions(), loss)


def train_notes(stage: Stage, model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Stage 2: the caption after a note, 64 vectors that say in words what each patch shows."""
    embed = model.get_input_embeddings()

    def loss(batch: Batch) -> torch.Tensor:
        words = note_ids(batch.answers, tokenizer)
        note = (embed(words) * (words != END_ID)[..., None]).sum(dim=2)
        inputs = torch.cat([note, embed(batch.ids[:, :-1])], dim=1)
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, note.shape[1] - 1 :])
        return _token_loss(logits, caption_labels(batch.ids))

    batches = _batches("notes", stage, tokenizer, seed)
    fit("notes", stage, [{"params": list(model.parameters())}], batches, loss)


def train_tower(
    name: str, stage: Stage, tower: SiglipVisionModel, tokenizer: Tokenizer, seed: int
) -> None:
    """Stage 3: `PATCH_QUESTIONS` answered by one linear head from each patch's feature."""
    sizes = list(PATCH_QUESTIONS.values())
    heads = nn.Linear(tower.config.hidden_size, sum(sizes) + CELLS + LENGTHS)
    # Five patches in six show no object: unweighted, they drown shape and size.
    weights = [torch.ones(size) for size in sizes]
    for weight in weights[1:]:
        weight[0] = NO_OBJECT_WEIGHT

    seen: list[torch.Tensor] = []

    def loss(batch: Batch) -> torch.Tensor:
        answers = heads(tower(normalise(batch.images)).last_hidden_state).float()
        *parts, cells, lengths = answers.split([*sizes, CELLS, LENGTHS], dim=-1)
        losses = [
            cross_entropy(part.flatten(0, 1), answer.flatten(), weight, ignore_index=IGNORE)
            for part, answer, weight in zip(
                parts, batch.answers.unbind(dim=-1), weights, strict=True
            )
        ]
        covered, measured = batch.geometry.split([CELLS, LENGTHS], dim=-1)
        known = ~measured.isnan()
        drawn = binary_cross_entropy_with_logits(cells, covered)
        placed = smooth_l1_loss(lengths[known], measured[known])
        seen.append(torch.stack([*losses, drawn, placed]).detach())
        if len(seen) % 100 == 0:
            means = torch.stack(seen[-100:]).mean(dim=0).tolist()
            names = [*PATCH_QUESTIONS, "cells", "lengths"]
            print(*(f"{name} {mean:.3f}" for name, mean in zip(names, means, strict=True)))
        return torch.stack(losses).mean() + drawn + placed

    batches = _batches(name, stage, tokenizer, seed)
    fit(name, stage, [{"params": [*tower.parameters(), *heads.parameters()]}], batches, loss)


def train_caption(
    stage: Stage, model: PrefixVLM, tokenizer: Tokenizer, seed: int, save: Callable[[], object]
) -> None:
    """Stage 4: captions from pictures, language model frozen but for LoRA."""
    added = [*model.projection.parameters(), *model.language_model.parameters()]
    groups = [
        {"params": [weight for weight in added if weight.requires_grad]},
        {"params": list(model.vision_encoder.parameters()), "lr": stage.tower_rate},
    ]

    def loss(batch: Batch) -> torch.Tensor:
        logits = model(normalise(batch.images), batch.ids)
        return _token_loss(logits, caption_labels(batch.ids))

    fit("caption", stage, groups, _batches("caption", stage, tokenizer, seed), loss, save)


def fit(
    name: str,
    stage: Stage,
    groups: list[dict[str, Any]],
    items: Iterable[Item],
    loss_of: Callable[[Item], torch.Tensor],
    save: Callable[[], object] | None = None,
) -> None:
    """AdamW, short warm-up, cosine decay, bfloat16 forward; leaves the moving average."""
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(stage.steps))
    average = [weight.detach().clone() for weight in weights]
    began, total = time.monotonic(), 0.0
    for step, item in enumerate(items, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(item)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - EMA_DECAY)
        total += loss.item()
        if step % 100 == 0:
            rate = step * stage.batch_size / (time.monotonic() - began)
            print(f"{name} {step}/{stage.steps} loss {total / 100:.4f} {rate:.0f}/s", flush=True)
            total = 0.0
        if save is not None and step % 500 == 0:
            _swap(weights, average)
            save()
            _swap(weights, average)
    _swap(weights, average)
    print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def _swap(weights: list[nn.Parameter], average: list[torch.Tensor]) -> None:
    for weight, mean in zip(weights, average, strict=True):
        kept = weight.detach().clone()
        weight.data.copy_(mean)
        mean.copy_(kept)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """[B,H,W,3] uint8 -> [B,3,H,W] float32 in [-1,1], as SigLIP's processor does."""
    return ((images.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def _schedule(steps: int) -> Callable[[int], float]:
    warm = min(200, steps // 10 + 1)

    def factor(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warm) * max(decay, 0.01)

    return factor


def _batches(name: str, stage: Stage, tokenizer: Tokenizer, seed: int) -> Iterable[Batch]:
    return drawn_batches(
        f"{seed}-{name}",
        stage.steps,
        stage.batch_size,
        tokenizer,
        IMAGE_SIZE,
        GRID,
        drawn=name != "notes",
    )


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def _stage(module: nn.Module, path: Path, seed: int, run: Callable[[], None]) -> None:
    """Train a module by `run`, or take up its saved result."""
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return
    torch.manual_seed(seed)
    run()
    torch.save(module.state_dict(), path)


def train(out: Path, seed: int, scale: float) -> None:
    """All stages; `scale` shortens each of them, for a trial."""
    language_stage, notes_stage, tower_stage, caption_stage = (
        replace(stage, steps=max(1, round(stage.steps * scale)))
        for stage in (LANGUAGE, NOTES, TOWER, CAPTION)
    )
    # Results of another seed or length are not taken up.
    stages = (language_stage, notes_stage, tower_stage)
    recipe = hashlib.sha256(repr((seed, stages)).encode()).hexdigest()[:8]
    work = out.with_name(f"{out.name}-stages")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    language, tower = new_language_model(tokenizer), new_tower()
    runs: dict[str, tuple[nn.Module, Callable[[], None]]] = {
        "language": (language, lambda: train_language(language_stage, language, tokenizer, seed)),
        "notes": (language, lambda: train_notes(notes_stage, language, tokenizer, seed)),
        "tower": (tower, lambda: train_tower("tower", tower_stage, tower, tokenizer, seed)),
        # A second cosine from a high rate: the shapes are learnt late in the first one.
        "again": (tower, lambda: train_tower("again", tower_stage, tower, tokenizer, seed)),
    }
    for name, (module, run) in runs.items():
        _stage(module, work / f"{name}-{recipe}.pt", seed, run)
    torch.manual_seed(seed)
    model = PrefixVLM(tower, wrap_lora(language, LORA_R, LORA_ALPHA, LORA_DROPOUT))
    config = checkpoint_config(
        tower.config,
        language.config,
        lora_r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        max_length=MAX_LENGTH,
    )

    def save() -> int:
        return write_checkpoint(out, model, config, tokenizer)

    train_caption(caption_stage, model, tokenizer, seed, save)
    print(f"{out}: {save()} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed, arguments.scale)


if __name__ == "__main__":
    main()
