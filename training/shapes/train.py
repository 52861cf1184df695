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
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    smooth_l1_loss,
)
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from training.fitting import Stage, fit, normalise, take_up, token_loss
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
NO_OBJECT_WEIGHT = 0.05

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
        return token_loss(logits, caption_labels(ids)[:, 1:])

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
        return token_loss(logits, caption_labels(batch.ids))

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
        return token_loss(logits, caption_labels(batch.ids))

    fit("caption", stage, groups, _batches("caption", stage, tokenizer, seed), loss, save)


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
        take_up(module, work / f"{name}-{recipe}.pt", seed, run)
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
