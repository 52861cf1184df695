"""Train shapes-smolvlm and write its checkpoint: `python -m training.shapes_smolvlm.train OUT`.

SmolVLM joins a pretrained SigLIP to a pretrained SmolLM2. Here the SigLIP is that of the shapes
captioner (`src/vlmport/builtin/shapes`, trained by `training.shapes`); the language model is made
first, then all of it is trained together:

1. `notes`: the language model answers from *notes*, one vector for each image token: the sum of
   the embeddings of the words for what its four patches show. No pictures yet.
2. `join`: tower and language model frozen, the connector learns.
3. `chat`: all weights learn to answer from pictures, whole or in tiles, one or two of them.
4. `again`: a second cosine from the same rate, with more of what is learnt late (captions, the
   color of a shape, what lies beside what, which of two pictures), and second pictures that come
   with a later question.
5. `captions`: short conversations, most of them a caption: where things lie is said by a few words
   only, which drown in long ones.

Each stage is seeded and saves its result in OUT-stages, so an interrupted run takes up at the
stage where it stopped. Set OMP_WAIT_POLICY=passive where other work shares the cores.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from training.fitting import Stage, fit, normalise, take_up, token_loss
from training.shapes.batches import note_ids
from training.shapes_smolvlm.batches import GRID, Batch, Diet, conversations
from training.shapes_smolvlm.checkpoint import model_config, write_checkpoint
from training.shapes_smolvlm.prompts import IMAGE, train_tokenizer

SHAPES = Path(__file__).parents[2] / "src/vlmport/builtin/shapes"
TOWER_ON_DISK = "vision_encoder.vision_model."
SCALE = 2  # patches of a feature, along each side

# Forms: one picture whole, one in tiles, two whole, two in tiles.
EVEN = Diet(forms=(0.45, 0.25, 0.25, 0.05))
LATE = Diet(
    forms=(0.52, 0.13, 0.30, 0.05),
    kinds={"caption": 3.0, "color": 3.0, "beside": 3.0, "which": 3.0},
    growing=0.25,
)
SHORT = Diet(
    forms=(0.78, 0.07, 0.12, 0.03),
    kinds={"caption": 8.0, "which": 8.0, "beside": 2.0},
    growing=0.25,
    turns=2,
)
LESSONS: dict[str, tuple[Stage, Diet]] = {
    "notes": (
        Stage(steps=1200, batch_size=32, rate=2e-3),
        Diet(forms=(0.65, 0.0, 0.35, 0.0), drawn=False),
    ),
    "join": (Stage(steps=300, batch_size=32, rate=2e-3), EVEN),
    "chat": (Stage(steps=1800, batch_size=32, rate=1e-3, tower_rate=3e-4), EVEN),
    "again": (Stage(steps=3500, batch_size=32, rate=1.5e-3, tower_rate=3e-4), LATE),
    "captions": (Stage(steps=1500, batch_size=32, rate=1.5e-3, tower_rate=3e-4), SHORT),
}


class Chat(nn.Module):
    """The model with the forward pass that training needs: losses where it speaks."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        # Eager: PyTorch's CPU flash attention is ten times slower in bfloat16.
        self.vlm = Idefics3ForConditionalGeneration._from_config(
            config, attn_implementation="eager"
        )
        model = self.vlm.model
        # Half the time of a step: what casts, norms and activations take is fused.
        for layer in [*model.vision_model.encoder.layers, *model.text_model.layers]:
            layer.compile(dynamic=True)

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """[B, N, 96, 96, 3] uint8 → [B·N·T, D]."""
        model = self.vlm.model
        pixels = normalise(tiles.flatten(0, 1))
        mask = torch.ones(len(pixels), GRID, GRID, dtype=torch.bool)
        hidden = model.vision_model(pixels, patch_attention_mask=mask).last_hidden_state
        return model.connector(hidden).flatten(0, 1)

    def loss(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """Mean loss of the spoken tokens, features [N, D] in the places of the image tokens."""
        model = self.vlm.model
        ids = batch.ids[:, :-1]
        embeds = model.get_input_embeddings()(ids)
        places = (ids == self.vlm.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
        hidden = model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        labels = batch.labels[:, 1:]
        spoken = labels >= 0
        return token_loss(self.vlm.lm_head(hidden[spoken])[None], labels[spoken][None])


def train_notes(stage: Stage, model: Chat, batches: Iterable[Batch], tokenizer: Tokenizer) -> None:
    """Stage 1: answers from notes [B, I·16, D] in the places of the features."""
    embed = model.vlm.get_input_embeddings()
    text = [*model.vlm.model.text_model.parameters(), *model.vlm.lm_head.parameters()]

    def loss(batch: Batch) -> torch.Tensor:
        B, pictures = batch.answers.shape[:2]
        words = note_ids(batch.answers.flatten(0, 1).flatten(0, 1)[None], tokenizer)[0]
        said = (embed(words) * (words != 0)[..., None]).sum(dim=-2)
        blocks = said.view(B * pictures, GRID // SCALE, SCALE, GRID // SCALE, SCALE, -1)
        return model.loss(batch, blocks.sum(dim=(2, 4)).flatten(0, 2) / SCALE)

    unique = list({id(weight): weight for weight in text}.values())
    fit("notes", stage, [{"params": unique}], batches, loss)


def train_pictures(
    name: str, stage: Stage, model: Chat, batches: Iterable[Batch], save: Callable[[], object]
) -> None:
    """The later stages: answers from pictures. All but the connector is frozen in `join`."""
    tower = list(model.vlm.model.vision_model.parameters())
    connector = list(model.vlm.model.connector.parameters())
    known = {id(weight) for weight in tower + connector}
    text = [weight for weight in model.vlm.parameters() if id(weight) not in known]
    for weight in tower + text:
        weight.requires_grad_(name != "join")
    groups = [{"params": connector}]
    if name != "join":
        groups = [{"params": connector + text}, {"params": tower, "lr": stage.tower_rate}]

    def loss(batch: Batch) -> torch.Tensor:
        return model.loss(batch, model.features(batch.tiles))

    fit(name, stage, groups, batches, loss, save)


def load_tower(model: Chat) -> None:
    """The vision tower of the shapes captioner, whose sizes ours has."""
    stored = load_file(SHAPES / "model.safetensors")
    state = {
        key.removeprefix(TOWER_ON_DISK): value.float()
        for key, value in stored.items()
        if key.startswith(TOWER_ON_DISK)
    }
    model.vlm.model.vision_model.load_state_dict(state)


def train(out: Path, seed: int, scale: float) -> None:
    """All stages; `scale` shortens each of them, for a trial."""
    work = out.with_name(f"{out.name}-stages")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    model = Chat(model_config(tokenizer))
    assert tokenizer.token_to_id(IMAGE) == model.vlm.config.image_token_id
    load_tower(model)
    done: list[tuple[str, Stage, Diet]] = []
    for name, (whole, diet) in LESSONS.items():
        stage = replace(whole, steps=max(1, round(whole.steps * scale)))
        # Results of another seed, length or diet, or after other stages, are not taken up.
        done.append((name, stage, diet))
        recipe = hashlib.sha256(repr((seed, done)).encode()).hexdigest()[:8]

        def save() -> int:
            return write_checkpoint(out, model.vlm, tokenizer)

        def run(name: str = name, stage: Stage = stage, diet: Diet = diet) -> None:
            drawn = f"{seed}-smolvlm-{name}"
            batches = conversations(drawn, stage.steps, stage.batch_size, tokenizer, diet)
            if name == "notes":
                train_notes(stage, model, batches, tokenizer)
            else:
                train_pictures(name, stage, model, batches, save)

        take_up(model, work / f"{name}-{recipe}.pt", seed, run)
        print(f"{out}: {save()} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed, arguments.scale)


if __name__ == "__main__":
    main()
