"""Which graphs a request for a precision means, and what is said where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_json
from tests.errors import raises
from vlmport.bundle import MANIFEST, read_manifest
from vlmport.bundle.precisions import split_precisions
from vlmport.errors import BundleError

VISION, EMBED, LM = "vision_encoder", "embed_tokens", "decoder_model_merged"
CHOICES = {
    "auto": ("q8", "q4", "q4"),
    "fp32": ("fp32", "fp32", "fp32"),
    "q4": ("q4", "q4", "q4"),
    "vision=fp32": ("fp32", "q4", "q4"),
    "vision_encoder=fp32, decoder=fp32": ("fp32", "q4", "fp32"),
    "embed=fp32,vision=q4": ("q4", "fp32", "q4"),
    "int8": ("q8", "q8", "q8"),
    " q4 ": ("q4", "q4", "q4"),
    "vision=int8": ("q8", "q4", "q4"),
}


@pytest.mark.parametrize(("asked", "expected"), CHOICES.items())
def test_precisions_are_chosen(asked: str, expected: tuple[str, ...], tiny_bundle: Path) -> None:
    chosen = read_manifest(tiny_bundle / MANIFEST).choose(asked)
    names = (VISION, EMBED, LM)
    assert chosen == {"image_processor": "any", **dict(zip(names, expected, strict=True))}


def test_auto_follows_the_device(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle / MANIFEST)
    assert manifest.choose("auto", "wasm")[LM] == "q8"
    assert manifest.choose("auto", "a device of tomorrow") == manifest.choose("auto", "cpu")
    assert manifest.choose("vision=q4", "wasm")[LM] == "q8"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("fp16", "precision 'fp16' is not in this bundle (component vision_encoder)"),
        ("Q4", "precision 'Q4' is not in this bundle"),
        ("", "precision '' is not in this bundle"),
        ("any", "precision 'any' is not in this bundle"),
        ("vision=fp16", "precision 'fp16' is not in this bundle (component vision_encoder)"),
        ("vison=q4", "no component 'vison' (did you mean 'vision'?)"),
        ("=", "no component ''"),
        ("vision=q4,decoder", "precision '' is not in this bundle"),
        ("vision=q4,vision_encoder=q8", "vision_encoder is named twice"),
    ],
)
def test_what_is_not_there_is_not_chosen(asked: str, expected: str, tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle / MANIFEST)
    with pytest.raises(BundleError) as caught:
        manifest.choose(asked)
    assert expected in str(caught.value)
    assert caught.value.hint
    # An export replaces the bundle: what it holds has to be named again.
    again = "it holds fp32, q8, q4; to have it too, export again with --precision fp32,fp16,q8,q4"
    assert (caught.value.hint == again) == ("fp16" in asked)  # what export knows


def test_a_precision_counts_when_every_component_has_it(tiny_bundle: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    del raw["components"][VISION]["q4"]
    for choice in raw["auto"].values():
        choice[VISION] = "fp32"
    write_json(tmp_path / MANIFEST, raw)
    manifest = read_manifest(tmp_path / MANIFEST)
    assert manifest.precisions == ("fp32", "q8")
    assert manifest.choose("auto")[VISION] == "fp32"
    with raises(BundleError, "precision.not-in-bundle", "vision_encoder") as caught:
        manifest.choose("q4")
    assert caught.value.hint == (
        "it holds fp32, q8; to have it too, export again with --precision fp32,q8,q4"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fp32", ("fp32",)),
        (" fp32 , int8,,fp32", ("fp32", "q8")),
        (["q4", " int8 "], ("q4", "q8")),
        (("q8", "int8"), ("q8",)),
        ("", ()),
        (" , ", ()),
        ("fp31", ("fp31",)),
    ],
)
def test_precisions_are_split(given: Any, expected: tuple[str, ...]) -> None:
    assert split_precisions(given) == expected
