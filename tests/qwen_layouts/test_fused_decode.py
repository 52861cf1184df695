"""The example's plain loop over two graphs says what PyTorch and the runtime say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.qwen_layouts.conftest import IMAGE, Model, drawn, user
from vlmport.parity.asked import Request
from vlmport.parity.truth import Truth
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples/fused_decode.py"
QUESTION = "What is this?"
PICTURES = drawn((70, 101), (200, 33))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fused_decode", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_needs_no_vlmport() -> None:
    lines = PROGRAM.read_text().splitlines()
    modules = {line.split()[1].partition(".")[0] for line in lines if "import " in line}
    allowed = {"argparse", "json", "os", "pathlib", "numpy", "onnxruntime", "PIL", "tokenizers"}
    assert {*modules} - {"without"} <= allowed


def test_pytorchs_tokens_and_the_runtimes(model: Model, example: ModuleType) -> None:
    asker, reference, size = example.Asker(model.fused.folder, "fp32"), model.reference, model.size
    manifest = model.fused.manifest
    most, token = manifest.generation.max_new_tokens, manifest.prompt.image_token_id
    pixels = size.width * size.height
    options = {"min_pixels": pixels, "max_pixels": pixels}
    with VLM.open(model.hub, precision="fp32") as vlm:
        for picture in PICTURES:
            request = Request(picture.name, (picture,), (user(IMAGE, QUESTION),))
            request = reference.at_size(request, size.width, size.height)
            truth = Truth.of(reference, request, most, token)
            assert asker.prompt(QUESTION, len(truth.features)) == truth.prompt_ids.tolist()
            tokens = asker.generate(picture.image, QUESTION)
            assert tokens[: len(truth.made.tokens)] == truth.made.tokens.tolist()
            resized = np.asarray(request.images[0])
            answer = vlm.generate(request.messages, [resized], image_options=options)
            same = min(len(tokens), len(answer.token_ids))
            assert same >= len(truth.made.tokens)
            assert tokens[:same] == list(answer.token_ids)[:same]


def test_half_precision_runs(models: dict[str, Model], example: ModuleType) -> None:
    asker = example.Asker(models["qwen3_vl"].fused.folder, "fp16")
    assert asker.generate(PICTURES[0].image, QUESTION)


def test_it_runs_as_a_program(models: dict[str, Model], tmp_path: Path) -> None:
    """A transparent picture lies on white, so what a file keeps there is not seen."""
    folder, answers = models["qwen2_5_vl"].fused.folder, []
    for number, hidden in enumerate((0, 255)):
        rgba = np.full((40, 50, 4), hidden, np.uint8)
        rgba[..., 3] = 0
        rgba[10:20, 5:30] = (200, 30, 40, 255)
        path = tmp_path / f"{number}.png"
        Image.fromarray(rgba).save(path)
        command = [sys.executable, PROGRAM, folder, path, QUESTION]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        answers.append(done.stdout)
    assert answers[0] == answers[1]
