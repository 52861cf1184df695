"""A short slice of the fuzzing, the same each time; `python -m tests.fuzz` goes on from here."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import COMMAND_LINE, TARGETS, Target
from tests.fuzz.workshop import Workshop

# An example that is exported takes a second, one that is refused next to nothing.
EXAMPLES = {
    "config.json": 6,
    "idefics3's config.json": 6,
    "idefics3's preprocessor_config.json": 6,
    "qwen2.5's config.json": 6,
    "qwen3's config.json": 6,
    "model.safetensors": 40,
    "model.safetensors.index.json": 40,
    "vlmport.json": 20,
    "valid vlmport.json": 6,
    "valid vlmport.json, components": 6,
    "valid vlmport.json, fused": 5,
    "valid vlmport.json, genai": 5,
    "ONNX file": 40,
    "picture": 80,
    "bundle's tokenizer.json": 6,
    "bundle's tokenizer_config.json": 6,
    "bundle's chat_template.jinja": 6,
}
FEW = 3


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("fuzz"))


def target_of(target: Target) -> Any:
    """A case of the test below; those that export or load a whole bundle are slow."""
    export = target.name.startswith("valid ") or target.name.endswith("config.json")
    return pytest.param(target, id=target.name, marks=[pytest.mark.slow] if export else [])


@pytest.mark.parametrize("target", [target_of(one) for one in TARGETS])
def test_bad_input_gives_an_error_of_ours_or_a_right_result(target: Target, shop: Workshop) -> None:
    @settings(
        max_examples=EXAMPLES.get(target.name, FEW),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it then refuses or mends
            target.run(shop, data.draw(target.inputs(shop)))

    fuzz()


@pytest.mark.slow
def test_whatever_is_typed_ends_with_a_line() -> None:
    """In a process of its own, which forks for each command."""
    options = ["--target", COMMAND_LINE.name, "--seed", "1", "--examples", "5"]
    command = [sys.executable, "-m", "tests.fuzz", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
