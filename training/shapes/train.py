"""Train the shapes captioner and write its checkpoint: `python -m training.shapes.train OUT`.

Three stages, each seeded:

1. `language`: a byte-level BPE tokenizer and a small Llama learn captions alone, no pictures.
2. `tower`: distilvit2 starts from a pretrained SigLIP. None of this size exists, so the tower
   first learns what every patch shows (shape, colour, size, background, place in the caption).
3. `caption`: distilvit2's own training. The language model is frozen; projection, LoRA on
   q, k, v and o projections and the vision tower learn to caption pictures.

The answers' heads of stage 2 are thrown away. Each stage saves its result beside OUT, so an
interrupted run takes up at the stage where it stopped.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from training.shapes.batches import (
    IGNORE,
    PATCH_QUESTIONS,
    Batch,
    caption_labels,
    drawn_batches,
    encode_captions,
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

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """Length and peak learning rate of one stage."""

    steps: int
    batch_size: int
    rate: float


LANGUAGE = Stage(steps=500, batch_size=128, rate=2e-3)
TOWER = Stage(steps=1000, batch_size=64, rate=1e-3)
CAPTION = Stage(steps=6000, batch_size=64, rate=1e-3)


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


def train_language(stage: Stage, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """Stage 1: next caption token from the ones before it. The first is not predicted."""
    model = new_language_model(tokenizer)
    rng = random.Random(f"{seed}-language")

    def captions() -> Iterable[torch.Tensor]:
        for _ in range(stage.steps):
            scenes = [random_scene(rng) for _ in range(stage.batch_size)]
            yield encode_captions(tokenizer, [caption(scene) for scene in scenes])

    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return _token_loss(logits, caption_labels(ids)[:, 1:])

    fit("language", stage, list(model.parameters()), captions(), loss)
    return model


def train_tower(stage: Stage, tokenizer: Tokenizer, seed: int) -> SiglipVisionModel:
    """Stage 2: `PATCH_QUESTIONS` answered by one linear head from each patch's feature."""
    tower = new_tower()
    sizes = list(PATCH_QUESTIONS.values())
    heads = nn.Linear(tower.config.hidden_size, sum(sizes))

    def loss(batch: Batch) -> torch.Tensor:
        answers = heads(tower(normalise(batch.images)).last_hidden_state).float()
        parts = answers.split(sizes, dim=-1)
        losses = [
            cross_entropy(part.flatten(0, 1), answer.flatten(), ignore_index=IGNORE)
            for part, answer in zip(parts, batch.answers.unbind(dim=-1), strict=True)
        ]
        return torch.stack(losses).mean()

    batches = _batches("tower", stage, tokenizer, seed)
    fit("tower", stage, [*tower.parameters(), *heads.parameters()], batches, loss)
    return tower


def train_caption(
    stage: Stage, model: PrefixVLM, tokenizer: Tokenizer, seed: int, save: Callable[[], object]
) -> None:
    """Stage 3: captions from pictures, language model frozen but for LoRA."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def loss(batch: Batch) -> torch.Tensor:
        logits = model(normalise(batch.images), batch.ids)
        return _token_loss(logits, caption_labels(batch.ids))

    fit("caption", stage, trained, _batches("caption", stage, tokenizer, seed), loss, save)


def fit(
    name: str,
    stage: Stage,
    weights: list[nn.Parameter],
    items: Iterable[Item],
    loss_of: Callable[[Item], torch.Tensor],
    save: Callable[[], object] | None = None,
) -> None:
    """AdamW, short warm-up, cosine decay, bfloat16 forward; leaves the moving average."""
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
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
            save()
    for weight, mean in zip(weights, average, strict=True):
        weight.data.copy_(mean)


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
        answered=name == "tower",
    )


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def _resumed(path: Path, make: Callable[[], Result]) -> Result:
    """The stage's saved result, or a new one, saved."""
    if not path.exists():
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def train(out: Path, seed: int, scale: float) -> None:
    """All stages; `scale` shortens each of them, for a trial."""
    language_stage, tower_stage, caption_stage = (
        Stage(max(1, round(stage.steps * scale)), stage.batch_size, stage.rate)
        for stage in (LANGUAGE, TOWER, CAPTION)
    )
    began = time.monotonic()
    torch.manual_seed(seed)
    work = out.with_name(f"{out.name}-stages")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    language = new_language_model(tokenizer)
    language.load_state_dict(
        _resumed(
            work / "language.pt",
            lambda: train_language(language_stage, tokenizer, seed).state_dict(),
        )
    )
    tower = new_tower()
    tower.load_state_dict(
        _resumed(work / "tower.pt", lambda: train_tower(tower_stage, tokenizer, seed).state_dict())
    )
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
    minutes = (time.monotonic() - began) / 60
    print(f"{out}: {save()} bytes after {minutes:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed, arguments.scale)


if __name__ == "__main__":
    main()
