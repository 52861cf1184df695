"""transformers.js answers questions about pictures, cut into tiles and whole, as vlmport does.

It gets the pixels of the bundle's own image processor: its own are resized after they were
normalised, by another filter. Prompt and tokens are the client's own work.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.transformers_js.test_transformers_js import HERE, MODELS, client, pictures
from vlmport.bundle import ANY, Bundle
from vlmport.exporter import export
from vlmport.runtime.model import VLM

__all__ = ["client", "pictures"]  # fixtures

IMAGE = {"type": "image"}
TOKENS = 12


def user(*parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": texts}


CONVERSATIONS = {
    "one picture": ([user(IMAGE, "What is this?")], 1),
    "two pictures": ([user(IMAGE, "and", IMAGE, "differ how?")], 2),
    "two turns": (
        [
            user(IMAGE, "What is this?"),
            {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
            user("Which colour?"),
        ],
        1,
    ),
    "text alone": ([user("Why is the sky blue?")], 0),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both model types, in every precision that the client has a kernel for."""
    folder = tmp_path_factory.mktemp("conversations")

    def bundle(model_type: Any, precisions: tuple[str, ...]) -> Path:
        source = write_idefics3_checkpoint(folder / f"{model_type}-source", model_type=model_type)
        return export(source, folder / model_type, precisions=precisions).folder

    return {
        "idefics3": bundle("idefics3", ("fp32", "fp16", "q8", "q4")),
        "smolvlm": bundle("smolvlm", ("fp32",)),
    }


def answer(
    folder: Path, messages: Any, shown: list[Path], split: bool, dtype: str | None
) -> dict[str, Any]:
    """What the client says, given our pixels."""
    request = {"messages": messages, "pictures": list(map(str, shown)), "tokens": TOKENS}
    request |= {"split": split, "dtype": dtype}
    if shown:
        file = folder.parent / "pixels.f32"
        file.write_bytes(pixel_values(folder, shown, split).tobytes())
        request["pixels"] = str(file)
    node = shutil.which("node")
    assert node is not None
    done = subprocess.run(
        [node, str(HERE / "ask.mjs"), str(folder)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout)
    assert given["messages"] == []
    return given


def pixel_values(folder: Path, shown: list[Path], split: bool) -> np.ndarray:
    """float32 [1, n, 3, side, side]: the tiles of all pictures in one row."""
    options = {"do_image_splitting": split}
    with VLM.open(folder, precision="fp32") as model:
        made = [
            model.components.process_image(np.asarray(Image.open(one).convert("RGB")), options)
            for one in shown
        ]
    return np.concatenate([one.inputs["pixel_values"] for one in made], axis=1)


def ours(folder: Path, messages: Any, shown: list[Path], split: bool, mix: str) -> list[int]:
    with VLM.open(folder, precision=mix, threads=1) as model:
        options = {"do_image_splitting": split}
        answer = model.generate(messages, shown, image_options=options, max_new_tokens=TOKENS)
        return list(answer.token_ids)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.usefixtures("client")
def test_conversations(
    bundles: dict[str, Path], pictures: list[Path], name: str, split: bool
) -> None:
    messages, count = CONVERSATIONS[name]
    folder, shown = bundles["idefics3"], pictures[:count]
    given = answer(folder, messages, shown, split, "fp32")
    assert given["class"] == "Idefics3ForConditionalGeneration"
    assert given["ids"] == ours(folder, messages, shown, split, "fp32")
    assert len(set(given["ids"])) > 3
    if count:
        assert (given["pixels"][1] > count) == split


@pytest.mark.parametrize("dtype", ["q8", "q4", "fp16"])
@pytest.mark.usefixtures("client")
def test_precisions(bundles: dict[str, Path], pictures: list[Path], dtype: str) -> None:
    """fp16 has a float16 cache; q8 scales activations by all tiles of a run, which the client has
    in one and we one by one, so it is asked about one tile."""
    messages, folder = CONVERSATIONS["one picture"][0], bundles["idefics3"]
    given = answer(folder, messages, pictures[:1], dtype != "q8", dtype)
    assert given["dtypes"] == dict.fromkeys(MODELS, dtype)
    assert given["ids"] == ours(folder, messages, pictures[:1], dtype != "q8", dtype)


@pytest.mark.usefixtures("client")
def test_without_a_dtype(bundles: dict[str, Path], pictures: list[Path]) -> None:
    messages, folder = CONVERSATIONS["one picture"][0], bundles["idefics3"]
    given = answer(folder, messages, pictures[:1], False, None)
    auto = Bundle.open(folder).manifest.auto["cpu"]
    assert given["dtypes"] == {name: one for name, one in auto.items() if one != ANY}
    mix = ",".join(f"{name}={one}" for name, one in given["dtypes"].items())
    assert given["ids"] == ours(folder, messages, pictures[:1], False, mix)


@pytest.mark.usefixtures("client")
def test_smolvlm(bundles: dict[str, Path], pictures: list[Path]) -> None:
    messages, folder = CONVERSATIONS["one picture"][0], bundles["smolvlm"]
    given = answer(folder, messages, pictures[:1], True, "fp32")
    assert given["class"] == "SmolVLMForConditionalGeneration"
    assert given["ids"] == ours(folder, messages, pictures[:1], True, "fp32")
