"""shapes-smolvlm is trained on what Hugging Face's own processor and template make of a prompt."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import Idefics3ForConditionalGeneration

from training.fitting import IGNORE, take_up
from training.questions import Exchange, conversation, scene_pair
from training.shapes.scenes import draw, random_scene
from training.shapes_smolvlm.batches import FORMS, Conversations, Diet, encode, pad
from training.shapes_smolvlm.checkpoint import model_config, read_checkpoint, write_checkpoint
from training.shapes_smolvlm.evaluate import held_out_tasks, share, table
from training.shapes_smolvlm.prompts import (
    CHAT_TEMPLATE,
    END,
    IMAGE,
    image_text,
    render,
    tiles,
    train_tokenizer,
)
from vlmport.builtin import builtin_models

SIZES = [(300, 200), (128, 170), (288, 288), (192, 96), (96, 192), (1, 1), (500, 31), (193, 191)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(0)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was never trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shapes-smolvlm")
    write_checkpoint(folder, Idefics3ForConditionalGeneration(model_config(tokenizer)), tokenizer)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    settings = json.loads((folder / "processor_config.json").read_text())
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        image_seq_len=settings["image_seq_len"],
        chat_template=CHAT_TEMPLATE,
    )


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


# Pictures and prompts


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_processor(
    processor: Any, size: tuple[int, int], split: bool
) -> None:
    picture = noise(*size)
    mine, rows, columns = tiles(picture, split=split)
    made = processor.image_processor(
        [[picture]], do_image_splitting=split, return_row_col_info=True, return_tensors="np"
    )
    assert (made["rows"], made["cols"]) == ([[rows]], [[columns]])
    assert len(mine) == (rows * columns + 1 if rows else 1)
    theirs = (made["pixel_values"][0].transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255
    assert np.array_equal(mine, np.round(theirs).astype(np.uint8))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("pictures", [1, 2])
def test_prompts_are_those_of_template_and_processor(
    processor: Any, tokenizer: Tokenizer, pictures: int, split: bool
) -> None:
    rng = random.Random(f"{pictures}-{split}-prompts")
    for _ in range(5):
        scenes = scene_pair(rng) if pictures == 2 else [random_scene(rng)]
        exchanges = conversation(scenes, rng, 4)
        texts = [image_text(*tiles(draw(scene), split=split)[1:]) for scene in scenes]
        ids, _ = encode(tokenizer, exchanges, texts)
        messages = []
        for one in exchanges:
            asked = [*({"type": "image"} for _ in one.images), text(one.question)]
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": [text(one.answer)]})
        made = processor(
            text=processor.apply_chat_template(messages),
            images=[[draw(scene) for scene in scenes]],
            do_image_splitting=split,
            add_special_tokens=False,
        )
        assert ids == made["input_ids"][0]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_the_prompt_of_a_question_is_the_beginning_of_its_conversation(
    processor: Any, tokenizer: Tokenizer
) -> None:
    """What is asked for at the end of a prompt is what was learnt to follow there."""
    asked = Exchange("color", "what color is the square?", "red", (0,))
    parts = render([asked], [image_text(0, 0)])
    begun = tokenizer.encode("".join(one for one, _ in parts[:2]), add_special_tokens=False).ids
    whole, labels = encode(tokenizer, [asked], [image_text(0, 0)])
    assert whole[: len(begun)] == begun
    assert set(labels[: len(begun)]) == {IGNORE}
    message = {"role": "user", "content": [{"type": "image"}, text(asked.question)]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    made = processor(
        text=prompt, images=[[noise(9, 9)]], do_image_splitting=False, add_special_tokens=False
    )
    assert made["input_ids"][0] == begun


# Batches


def spoken(tokenizer: Tokenizer, ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """What the labels say, answer by answer."""
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    said = tokenizer.decode(labels[labels != IGNORE].tolist(), skip_special_tokens=False)
    return [one.strip() for one in said.split(END)[:-1]]


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_labels_stand_where_the_model_speaks(tokenizer: Tokenizer, form: int) -> None:
    forms = [float(number == form) for number in range(len(FORMS))]
    data = Conversations("labels", 1, 4, tokenizer, Diet(forms, growing=0.5))
    batch = data[0]
    image = tokenizer.token_to_id(IMAGE)
    per_picture = 16 * batch.tiles.shape[1]
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        assert (ids == image).sum() == per_picture  # as many features as places
        written = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        answers = [turn.split(END)[0].strip() for turn in written.split("Assistant:")[1:]]
        assert spoken(tokenizer, ids, labels) == answers
        assert (labels[ids == image] == IGNORE).all()
    assert batch.answers.shape[-1] == 0  # not looked at where pictures are drawn
    again = data[0]
    assert all(torch.equal(one, other) for one, other in zip(batch, again, strict=True))
    assert not torch.equal(Conversations("x", 1, 4, tokenizer, Diet(forms))[0].ids, batch.ids)


def test_notes_have_answers_and_no_pictures(tokenizer: Tokenizer) -> None:
    batch = Conversations("n", 1, 3, tokenizer, Diet((0.0, 0.0, 1.0, 0.0), drawn=False))[0]
    assert batch.tiles.shape == (3, 0)
    assert batch.answers.shape == (3, 2, 64, 6)
    image = tokenizer.token_to_id(IMAGE)
    assert ((batch.ids == image).sum(dim=1) == 32).all()


def test_padding_counts_nothing() -> None:
    ids, labels = pad([([5, 6, 7], [IGNORE, 6, 7]), ([8], [8])])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]


# The held-out tasks


def test_every_form_is_asked_about() -> None:
    tasks = held_out_tasks(200)
    counted = {(task.is_caption, task.form) for task in tasks}
    assert counted == {(True, FORMS[0]), (True, FORMS[1]), *((False, form) for form in FORMS)}
    for task in tasks:
        assert len(task.scenes) == task.form.images == len(task.exchange.images)


def test_what_is_right_is_counted() -> None:
    tasks = held_out_tasks(8)
    given = [task.exchange.answer for task in tasks]
    assert share(tasks, given) == 100
    given[0], given[-1] = "a red circle", " " + given[-1]
    assert share(tasks, given) == 100 * 14 / 16
    lines = table(tasks, given).splitlines()
    (captions,) = [line for line in lines if line.startswith("all captions")]
    (asked,) = [line for line in lines if line.startswith("all questions")]
    assert captions.split()[-2:] == ["87.5", "%"]
    assert "7/8" in captions
    assert "7/8" in asked


# The checkpoint, and what was trained before


def test_a_checkpoint_is_read_back_and_is_transformers_own(folder: Path) -> None:
    model, tokenizer = read_checkpoint(folder)
    theirs = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    config, kept = theirs.config, model_config(tokenizer)
    for name in ("image_token_id", "scale_factor", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(kept, name)
    assert theirs.generation_config.eos_token_id == tokenizer.token_to_id(END)


def test_what_ships(tokenizer: Tokenizer) -> None:
    """Small, with a licence, and with the tokenizer that the recipe trains."""
    folder = builtin_models()["shapes-smolvlm"]
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    shipped = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert shipped.to_str() == tokenizer.to_str()


def test_a_stage_is_trained_once(tmp_path: Path) -> None:
    def new() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(2, 2)

    runs: list[float] = []

    def trained(module: nn.Linear) -> nn.Linear:
        def run() -> None:
            runs.append(torch.rand(()).item())
            nn.init.constant_(module.weight, 7.0 + len(runs))

        take_up(module, tmp_path / "stage.pt", 5, run)
        return module

    first, second = trained(new()), trained(new())
    assert len(runs) == 1
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight, torch.full((2, 2), 8.0))
    torch.manual_seed(5)
    assert runs == [torch.rand(()).item()]  # seeded by the stage alone
    (tmp_path / "stage.pt").unlink()
    trained(new())
    assert len(runs) == 2
