"""Qwen-VL's prompts, to the id: known ones, and whatever transformers makes of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.graph.running import open_graph
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.shared_testdata import shared_testdata
from vlmport.checkpoint import Checkpoint
from vlmport.families import family_of
from vlmport.runtime.messages import check_messages
from vlmport.runtime.prompt import Prompter

IMAGE = {"type": "image"}
START, END, PAD = 151652, 151653, 151655
CLIP = [0.48145466, 0.4578275, 0.40821073]
# One thin layer under the real tokenizer, for pictures of the real sizes.
THIN: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL": {
        "vision": {"patch_size": 14, "window_size": 112, "depth": 1},
        "text": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        "pixels": {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": CLIP},
    },
    "Qwen3-VL": {
        "vision": {"patch_size": 16, "depth": 1, "deepstack_visual_indexes": [0]},
        "text": {"hidden_size": 16, "num_hidden_layers": 1},
        "pixels": {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    },
}
WRITERS: dict[str, Callable[..., Path]] = {"Qwen2.5-VL": write_qwen2_5, "Qwen3-VL": write_qwen3}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a picture, then words": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "Describe this image."}]}
    ],
    "words alone": [{"role": "user", "content": [{"type": "text", "text": "Why?\n\nI'm 42."}]}],
    "a text for a list": [{"role": "user", "content": "Why is the sky blue?"}],
    "three pictures among words": [
        {
            "role": "user",
            "content": [
                IMAGE,
                {"type": "text", "text": "and"},
                IMAGE,
                IMAGE,
                {"type": "text", "text": "?"},
            ],
        }
    ],
    "system, turns and a later picture": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello. An image?"}]},
        {"role": "user", "content": [{"type": "text", "text": "Here:"}, IMAGE]},
    ],
}


@dataclass(frozen=True)
class Model:
    """A checkpoint's prompts, without its weights."""

    folder: Path
    prompter: Prompter
    pictures: Callable[[int, int], np.ndarray]

    def ids(self, messages: list[dict[str, Any]], *sizes: tuple[int, int]) -> list[int]:
        """The prompt, for blank pictures of these widths and heights."""
        blanks = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
        chat = check_messages(messages, blanks)
        encoded = self.prompter.encode(self.prompter.render(chat.messages))
        return self.prompter.splice(encoded, [self.pictures(*size) for size in sizes]).tolist()


def opened(folder: Path) -> Model:
    family: Any = family_of(Checkpoint.open(folder))
    session = open_graph(family.fixed_graphs()["image_processor"], {})
    limits = {name: np.array(value) for name, value in family.image_options.items()}

    def pictures(width: int, height: int) -> np.ndarray:
        feeds = {"image": np.zeros((height, width, 3), np.uint8), **limits}
        return np.asarray(session.run(["prompt_ids"], feeds)[0])

    return Model(folder, Prompter(folder, family.prompt), pictures)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The real tokenizers, templates and sizes."""
    models = {}
    for name, write in WRITERS.items():
        tokenizer = shared_testdata("tokenizers", name)
        if tokenizer is None:
            pytest.skip("no shared test data")
        folder = tmp_path_factory.mktemp(name) / "checkpoint"
        models[name] = opened(write(folder, tokenizer=tokenizer, **THIN[name]))
    return models


def test_the_known_prompt_of_qwen2_5(real: dict[str, Model]) -> None:
    """A system message of its own; 960 x 686 is 34 x 24 blocks: 24.5 is rounded to the even."""
    ids = real["Qwen2.5-VL"].ids(CONVERSATIONS["a picture, then words"], (960, 686))
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert ids[: len(system) + 4] == [*system, 151644, 872, 198, START]
    assert ids[len(system) + 4 :][:817] == [*[PAD] * 816, END]
    assert ids[-5:] == [151645, 198, 151644, 77091, 198]
    assert ids.count(PAD) == 816


def test_the_known_prompt_of_qwen3(real: dict[str, Model]) -> None:
    """No system message; 21 x 30 blocks of 32."""
    ids = real["Qwen3-VL"].ids(CONVERSATIONS["a picture, then words"], (960, 686))
    assert ids[:5] == [151644, 872, 198, START, PAD]
    assert ids[4 : 4 + 631] == [*[PAD] * 630, END]
    assert ids[-5:] == [151645, 198, 151644, 77091, 198]
    assert ids.count(PAD) == 630


@pytest.mark.parametrize(
    ("width", "height", "tokens"), [(672, 672, 576), (640, 480, 391), (224, 224, 64)]
)
def test_the_known_sizes_of_qwen2_5(
    real: dict[str, Model], width: int, height: int, tokens: int
) -> None:
    assert real["Qwen2.5-VL"].pictures(width, height).tolist() == [PAD] * tokens


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", WRITERS)
def test_real_prompts_are_transformers(
    real: dict[str, Model], name: str, messages: list[dict[str, Any]]
) -> None:
    assert_as_transformers(real[name], messages)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("spelling", ["v4", "v5"])
@pytest.mark.parametrize("name", WRITERS)
def test_stand_in_prompts_are_transformers(
    tmp_path: Path, name: str, spelling: str, messages: list[dict[str, Any]]
) -> None:
    folder = WRITERS[name](tmp_path / "checkpoint", spelling=spelling)
    template = folder / "chat_template.jinja"
    assert template.is_file() == (spelling == "v5")
    assert_as_transformers(opened(folder), messages)


def assert_as_transformers(model: Model, messages: list[dict[str, Any]]) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(model.folder))
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    parts = [
        part for one in messages if isinstance(one["content"], list) for part in one["content"]
    ]
    sizes = [(90, 60), (300, 200), (64, 640)][: parts.count(IMAGE)]
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(str(model.folder))
    for width, height in sizes:
        made = processor(images=[np.zeros((height, width, 3), np.uint8)])
        count = int(np.prod(made["image_grid_thw"])) // processor.merge_size**2
        text = text.replace("<|image_pad|>", "<|x|>" * count, 1)
    text = text.replace("<|x|>", "<|image_pad|>")
    assert model.ids(messages, *sizes) == tokenizer(text, add_special_tokens=False)["input_ids"]
