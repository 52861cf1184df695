"""The example's plain loop over the four files says what the runtime says, token for token."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

from vlmport.bundle import Bundle
from vlmport.bundle.layouts import COMPONENTS
from vlmport.exporter import export
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples/components_loop.py"
PICTURES = sorted((ROOT / "examples").glob("*.png"))
PRECISIONS = ("fp32", "q8", "q4")


@pytest.fixture(scope="module")
def folders(
    built_in: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The built-in captioner in both layouts."""
    four = tmp_path_factory.mktemp("shapes") / "four"
    export("shapes", four, precisions=PRECISIONS, layout=COMPONENTS)
    return built_in("shapes").folder, four


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("components_loop", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_needs_no_vlmport() -> None:
    assert "vlmport" not in "".join(
        line for line in PROGRAM.read_text().splitlines() if "import" in line
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_runtimes_tokens(
    folders: tuple[Path, Path], example: ModuleType, precision: str
) -> None:
    hub, four = folders
    captioner = example.Captioner(four, precision)
    with VLM.open(hub, precision=precision) as vlm:
        for path in PICTURES:
            expected = vlm.caption(path)
            with Image.open(path) as image:
                assert captioner.generate(image) == list(expected.token_ids), path.name
                assert captioner.caption(image) == expected.text


def test_a_transparent_picture_lies_on_white(
    folders: tuple[Path, Path], example: ModuleType
) -> None:
    """Where nothing is seen, the colour that a file keeps there is not either."""
    hub, four = folders
    captioner = example.Captioner(four, "fp32")
    with Image.open(ROOT / "examples/red_square.png") as image:
        picture = image.convert("RGBA")
    pixels = np.array(picture)
    background = (pixels[..., :3].astype(int).sum(-1)) > 600
    pixels[background] = (0, 0, 0, 0)
    hidden = Image.fromarray(pixels)
    with VLM.open(hub, precision="fp32") as vlm:
        expected = vlm.caption(hidden)
    assert expected.text == "a red square on a white background"
    assert captioner.generate(hidden) == list(expected.token_ids)


def test_no_token_is_added_before_the_text(folders: tuple[Path, Path], example: ModuleType) -> None:
    """Some tokenizers put a BOS before every text; the model was trained without one."""
    captioner = example.Captioner(folders[1], "fp32")
    with Image.open(PICTURES[0]) as image:
        plain, with_text = captioner.generate(image), captioner.generate(image, "a")
        captioner.tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        assert captioner.generate(image) == plain
        assert captioner.generate(image, "a") == with_text


def test_it_runs_as_a_program(folders: tuple[Path, Path]) -> None:
    command = [sys.executable, PROGRAM, folders[1], ROOT / "examples/red_square.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "a red square on a white background\n"


def test_a_text_after_the_picture(folders: tuple[Path, Path], example: ModuleType) -> None:
    """As PyTorch goes on from it: generate with the prefix and the text's embeddings."""
    from vlmport.builtin import builtin_folder
    from vlmport.parity.references import load_reference

    bundle = Bundle.open(folders[1])
    checkpoint = builtin_folder("shapes")
    assert checkpoint is not None
    token = bundle.manifest.prompt.image_token_id
    reference = load_reference(checkpoint, image_token_id=token)
    captioner = example.Captioner(folders[1], "fp32")
    text = "a large"
    words = np.array(captioner.tokenizer.encode(text).ids)
    for path in PICTURES:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        features = reference.vision_features(reference.pixels(image))
        ids = np.concatenate([reference.image_ids(image), words])
        made = reference.generate(
            reference.embeds(ids, features), bundle.manifest.generation.max_new_tokens, ids
        )
        assert captioner.generate(image, text) == made.tokens.tolist(), path.name
