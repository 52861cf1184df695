"""transformers.js answers about a picture by Qwen-VL's classes, as vlmport does.

It gets the pixels of the bundle's own image processor: its own are resized by another filter. The
pictures' sides are not halfway between two multiples, where it rounds otherwise. Its limits that no
bundle can mend are kept out: several pictures, and text alone.
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

from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.transformers_js.test_transformers_js import HERE, MODELS, client
from vlmport.bundle import ANY, Bundle
from vlmport.exporter import export
from vlmport.parity.pictures import drawn_pictures
from vlmport.runtime.model import VLM

__all__ = ["client"]  # a fixture

TOKENS = 12
SIZES = ((70, 101), (205, 60))
CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
TURNS = [
    ASKED,
    {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds, in every precision that the client has a kernel for."""
    root = tmp_path_factory.mktemp("qwen")
    sources = {
        "qwen2_5_vl": write_qwen2_5(root / "2.5"),
        "qwen3_vl": write_qwen3(root / "3", seed=1),
    }
    precisions = ("fp32", "fp16", "q8", "q4")
    return {
        kind: export(source, root / kind, precisions=precisions).folder
        for kind, source in sources.items()
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures")
    paths = []
    for picture in drawn_pictures(SIZES):
        paths.append(root / f"{picture.name}.png")
        picture.image.save(paths[-1])
    return paths


def answer(folder: Path, messages: Any, picture: Path, dtype: str | None) -> dict[str, Any]:
    """What the client says, given our pixels, after it has warned of nothing."""
    with VLM.open(folder, precision="fp32") as model:
        made = model.components.process_image(np.asarray(Image.open(picture)))
    file = folder.parent / "pixels.f32"
    file.write_bytes(made.inputs["pixel_values"].tobytes())
    request = {"messages": messages, "pictures": [str(picture)], "tokens": TOKENS}
    request |= {"dtype": dtype, "pixels": str(file)}
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
    assert given["pixels"] == list(made.inputs["pixel_values"].shape)
    return given


def ours(folder: Path, messages: Any, picture: Path, precision: str) -> list[int]:
    with VLM.open(folder, precision=precision, threads=1) as model:
        return list(model.generate(messages, [picture], max_new_tokens=TOKENS).token_ids)


@pytest.mark.parametrize("messages", [[ASKED], TURNS], ids=["one turn", "two turns"])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.usefixtures("client")
def test_one_picture(
    bundles: dict[str, Path], pictures: list[Path], kind: str, messages: Any
) -> None:
    folder = bundles[kind]
    for picture in pictures:
        given = answer(folder, messages, picture, "fp32")
        assert given["class"] == CLASSES[kind]
        assert given["ids"] == ours(folder, messages, picture, "fp32")
        assert len(set(given["ids"])) > 2  # of a model that says one thing, nothing is learnt


@pytest.mark.parametrize("dtype", ["q8", "q4", "fp16"])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.usefixtures("client")
def test_precisions(bundles: dict[str, Path], pictures: list[Path], kind: str, dtype: str) -> None:
    """fp16 has a float16 cache."""
    folder = bundles[kind]
    given = answer(folder, [ASKED], pictures[0], dtype)
    assert given["dtypes"] == dict.fromkeys(MODELS, dtype)
    assert given["ids"] == ours(folder, [ASKED], pictures[0], dtype)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.usefixtures("client")
def test_without_a_dtype(bundles: dict[str, Path], pictures: list[Path], kind: str) -> None:
    folder = bundles[kind]
    given = answer(folder, [ASKED], pictures[0], None)
    auto = Bundle.open(folder).manifest.auto["cpu"]
    assert given["dtypes"] == {name: one for name, one in auto.items() if one != ANY}
    mix = ",".join(f"{name}={one}" for name, one in given["dtypes"].items())
    assert given["ids"] == ours(folder, [ASKED], pictures[0], mix)
