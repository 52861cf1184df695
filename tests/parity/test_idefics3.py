"""The ladder on Idefics3 and SmolVLM: whole ones pass, and each fault of theirs has its rung."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.parity.conftest import Case, assert_first_broken
from tests.parity.surgery import copied, edit_tensor, renewed
from vlmport.bundle import Bundle
from vlmport.exporter import export
from vlmport.families.idefics3 import family
from vlmport.families.idefics3.pixel_shuffle import Connector
from vlmport.families.idefics3.tiling import Tiles, TileTokens, Tiling
from vlmport.parity import verify
from vlmport.parity.judging import max_new_tokens
from vlmport.parity.ladders import run_ladder
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.pictures import drawn_pictures
from vlmport.parity.references import load_reference
from vlmport.parity.report import Report
from vlmport.parity.truth import Truth
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.prompt import Prompter

Patch = pytest.MonkeyPatch

# Split and whole, for five sizes; two pictures over two turns; two split; text alone.
REQUESTS = 13
SOME = ("drawn 120x300", "drawn 51x17 whole", "two pictures")


def case(checkpoint: Path, bundle: Bundle, name: str) -> Case:
    """The request of this name."""
    token = bundle.manifest.prompt.image_token_id
    reference = load_reference(checkpoint, image_token_id=token)
    pictures = drawn_pictures()
    request = next(one for one in reference.requests(pictures) if one.name == name)
    truth = Truth.of(reference, request, max_new_tokens(bundle.manifest), token)
    return Case(checkpoint, bundle, reference, pictures[0], request, truth)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics3_checkpoint(tmp_path_factory.mktemp("idefics3") / "checkpoint")


@pytest.fixture(scope="module")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two pictures, split: tiles of 120x300 and of 51x17."""
    bundle = export(checkpoint, tmp_path_factory.mktemp("idefics3") / "bundle", precisions="fp32")
    return case(checkpoint, bundle, "two pictures split")


VARIANTS: dict[str, dict[str, Any]] = {
    "smolvlm, transformers 5, bf16, shards": {
        "model_type": "smolvlm",
        "spelling": "v5",
        "dtype": "BF16",
        "shards": 2,
    },
    "tied head": {"config": {"tie_word_embeddings": True}, "dtype": "F16"},
    "other heads, sizes and factor": {
        "vision": {
            "patch_size": 4,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "layer_norm_eps": 1e-3,
            "hidden_act": "gelu",
        },
        "config": {"scale_factor": 4},
        "text": {"num_attention_heads": 8, "head_dim": 16, "rope_theta": 300.0},
    },
    # 31 patches a side, which the buckets don't map onto themselves; the picture is one tile.
    "buckets": {
        "vision": {"image_size": 62, "patch_size": 2, "num_hidden_layers": 1},
        "config": {"scale_factor": 31},
        "pixels": {"max_image_size": {"longest_edge": 62}, "size": {"longest_edge": 61}},
    },
    # As in SmolVLM2-2.2B, whose tiles are 27 patches of 14 and 6 pixels that nobody sees.
    "patches that do not fill a tile": {
        "vision": {"patch_size": 6},
        "config": {"scale_factor": 5},
    },
    "tiles smaller than the tower's pictures, bicubic": {
        "vision": {"image_size": 48},
        "pixels": {"resample": 3, "size": {"longest_edge": 97}},
    },
}


def some_rows(
    checkpoint: Path, bundle: Bundle, *precisions: str, adapter: Path | None = None
) -> Report:
    """The ladder on a caption of tiles, a whole picture and two: what a variant may change."""
    token = bundle.manifest.prompt.image_token_id
    reference = load_reference(checkpoint, image_token_id=token, adapter=adapter)
    requests = [one for one in reference.requests(drawn_pictures()) if one.name in SOME]
    assert len(requests) == len(SOME)
    return Report("", run_ladder(reference, bundle, precisions, requests))


def test_green(checkpoint: Path, tiny: Case) -> None:
    """All rungs at five sizes, split and whole, several pictures and turns, text alone."""
    report = verify(tiny.bundle, checkpoint)
    assert report.passed, report.summary
    assert len(report.rows) == REQUESTS * len(HubLadder.rungs)
    assert len({row.image for row in report.rows}) == REQUESTS


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_green(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint = write_idefics3_checkpoint(tmp_path / "checkpoint", **settings)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    report = some_rows(checkpoint, bundle, "fp32")
    assert report.passed, report.summary


def test_eight_bits_and_half(checkpoint: Path, tmp_path: Path) -> None:
    """Random weights bear 8 bits and float16; what 4 bits do to them says nothing."""
    bundle = export(checkpoint, tmp_path / "bundle", precisions=("q8", "fp16", "q4"))
    report = some_rows(checkpoint, bundle, "q8", "fp16")
    assert report.passed, report.summary
    exact = {"prompt_ids", "pixels", "position_ids", "vision_features", "merged_embeds"}
    assert {row.rung for row in some_rows(checkpoint, bundle, "q4").failures}.isdisjoint(exact)


def test_tiny_is_whole(tiny: Case) -> None:
    report = tiny.climb(tiny.bundle)
    assert report.passed, report.summary
    assert len(tiny.truth.pictures) == 2
    assert len(tiny.truth.made.tokens) == 32
    assert len(set(tiny.truth.made.tokens.tolist())) > 8


def test_an_image_token_that_the_model_says_itself(tmp_path: Path) -> None:
    """What comes after it is not compared: the reference can't be fed it as a word."""
    checkpoint = write_idefics3_checkpoint(tmp_path / "checkpoint", seed=0)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    cut = case(checkpoint, bundle, "drawn 51x17")
    assert cut.truth.is_cut
    assert cut.truth.made.tokens[-1] == bundle.manifest.prompt.image_token_id
    assert cut.climb(bundle).passed


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for q_proj and v_proj as PEFT saves it, with B that is not zero: the vision
    tower's layers have these names too."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.Idefics3ForConditionalGeneration.from_pretrained(checkpoint)
        adapted = peft.get_peft_model(model, settings)
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(str(folder))
    return folder


def test_an_adapter_that_hits_the_vision_tower(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    names = load_file(adapter / "adapter_model.safetensors")
    assert any("vision_model" in name for name in names)
    assert any("text_model" in name for name in names)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32", adapter=adapter)
    report = some_rows(checkpoint, bundle, "fp32", adapter=adapter)
    assert report.passed, report.summary
    without = some_rows(checkpoint, bundle, "fp32")
    assert without.first_broken is not None
    assert without.first_broken.rung == "vision_features"
    assert "first_logits" in {row.rung for row in without.failures}


# An exporter that is wrong


def whole_picture_first(patch: Patch) -> None:
    def rest_and_last(op: Any, tiles: Tiles) -> Tiles:
        first, last = (
            op.Slice(tiles.planes, [0], [-1], [0]),
            op.Slice(tiles.planes, [-1], [99], [0]),
        )
        return dataclasses.replace(tiles, planes=op.Concat(last, first, axis=0))

    changed_tiles(patch, rest_and_last)


def no_whole_picture(patch: Patch) -> None:
    """Where there are tiles. (Without any, the export itself finds no feature for its tokens.)"""

    def tiles_alone(op: Any, tiles: Tiles) -> Tiles:
        count = op.Max(op.Mul(tiles.rows, tiles.columns), 1)
        return dataclasses.replace(tiles, planes=op.Slice(tiles.planes, [0], count, [0]))

    changed_tiles(patch, tiles_alone)


def column_by_column(patch: Patch) -> None:
    def turned(op: Any, tiles: Tiles) -> Tiles:
        first, last = (
            op.Slice(tiles.planes, [0], [-1], [0]),
            op.Slice(tiles.planes, [-1], [99], [0]),
        )
        grid = op.Concat(tiles.rows, tiles.columns, [3, 32, 32], axis=0)
        first = op.Transpose(op.Reshape(first, grid, allowzero=1), perm=[1, 0, 2, 3, 4])
        first = op.Reshape(first, op.Shape(parted(op, tiles)[0]), allowzero=1)
        return dataclasses.replace(tiles, planes=op.Concat(first, last, axis=0))

    changed_tiles(patch, turned)


def parted(op: Any, tiles: Tiles) -> tuple[Any, Any]:
    """The tiles, and the whole picture."""
    return op.Slice(tiles.planes, [0], [-1], [0]), op.Slice(tiles.planes, [-1], [99], [0])


def changed_tiles(patch: Patch, change: Callable[[Any, Tiles], Tiles]) -> None:
    plain = Tiling.cut
    patch.setattr(Tiling, "cut", lambda self, op, *inputs: change(op, plain(self, op, *inputs)))


def no_longest_edge_first(patch: Patch) -> None:
    """The picture straight to whole tiles."""
    plain, calls = Tiling._resize, itertools.count()

    def second_alone(self: Tiling, op: Any, image: Any, *size: Any) -> Any:
        return plain(self, op, image, *size) if next(calls) % 2 else image

    patch.setattr(Tiling, "_resize", second_alone)


def sides_not_cut_as_python_does(patch: Patch) -> None:
    """The other side is not made even."""
    plain = Tiling._fit

    def odd(self: Tiling, op: Any, height: Any, width: Any) -> Any:
        tall, wide = plain(self, op, height, width)
        return op.Where(op.Less(tall, wide), op.Sub(tall, 1), tall), wide

    patch.setattr(Tiling, "_fit", odd)


def changed_tokens(patch: Patch, change: Callable[[TileTokens], dict[str, Any]]) -> None:
    plain = family.tile_tokens

    def changed(*args: Any) -> TileTokens:
        tokens = plain(*args)
        return dataclasses.replace(tokens, **change(tokens))

    patch.setattr(family, "tile_tokens", changed)


def rows_are_columns(patch: Patch) -> None:
    changed_tokens(patch, lambda tokens: {"markers": tokens.markers.T})


def newlines_that_do_not_join(patch: Patch) -> None:
    changed_tokens(patch, lambda tokens: {"newlines": [*tokens.newline] * 2})


def other_shuffle(patch: Patch) -> None:
    """Neighbours of a column before those of a row."""

    def shuffled(self: Connector, op: Any, x: Any) -> Any:
        f, small = self.factor, self.side // self.factor
        x = op.Reshape(x, [0, small, f, small, f, self.vision])
        x = op.Transpose(x, perm=[0, 1, 3, 4, 2, 5])
        row = f * f * self.vision
        return self.modality_projection(op, op.Reshape(x, [0, small * small, row]))

    patch.setattr(Connector, "forward", shuffled)


EXPORTERS: list[tuple[str, Callable[[Patch], None]]] = [
    ("prompt_ids", rows_are_columns),
    ("prompt_ids", newlines_that_do_not_join),
    ("pixels", whole_picture_first),
    ("pixels", no_whole_picture),
    ("pixels", column_by_column),
    ("pixels", no_longest_edge_first),
    ("pixels", sides_not_cut_as_python_does),
    ("vision_features", other_shuffle),
]


@pytest.mark.parametrize(("rung", "damage"), EXPORTERS, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_exporter(
    tiny: Case, tmp_path: Path, monkeypatch: Patch, rung: str, damage: Callable[[Patch], None]
) -> None:
    damage(monkeypatch)
    bundle = export(tiny.checkpoint, tmp_path / "bundle", precisions="fp32")
    assert_first_broken(tiny.climb(bundle), rung)


def test_positions_that_are_the_identity(tmp_path: Path, monkeypatch: Patch) -> None:
    checkpoint = write_idefics3_checkpoint(tmp_path / "checkpoint", **VARIANTS["buckets"])
    monkeypatch.setattr(family, "bucketed_positions", lambda patches, side: np.arange(side**2))
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    whole = case(checkpoint, bundle, "drawn 51x17 whole")
    assert_first_broken(whole.climb(bundle), "vision_features")


@pytest.mark.parametrize(
    ("rung", "misread"),
    [
        ("vision_features", {"vision": {"layer_norm_eps": 1e-5}}),
        ("vision_features", {"vision": {"hidden_act": "gelu"}}),
        ("first_logits", {"text": {"rms_norm_eps": 1e-4}}),
        ("first_logits", {"text": {"rope_theta": 10100.0}}),
        ("first_logits", {"config": {"tie_word_embeddings": True}}),
    ],
    ids=str,
)
def test_a_misread_config(tiny: Case, tmp_path: Path, rung: str, misread: dict[str, Any]) -> None:
    other = write_idefics3_checkpoint(tmp_path / "checkpoint", **misread)
    bundle = export(other, tmp_path / "bundle", precisions="fp32")
    assert_first_broken(tiny.climb(bundle), rung)


# A bundle, and a runtime


@pytest.fixture
def broken(tiny: Case, tmp_path: Path) -> Bundle:
    return copied(tiny.bundle, tmp_path / "broken")


def test_splitting_that_is_off_by_default(tiny: Case, broken: Bundle) -> None:
    """A request without options has the defaults of both sides."""
    off = {"do_image_splitting": False}
    broken = renewed(broken, lambda m: dataclasses.replace(m, image_options=off))
    assert_first_broken(tiny.climb(broken), "prompt_ids")


def test_one_marker(tiny: Case, broken: Bundle) -> None:
    """A space after `User:`, as ports of this model have it: the pictures are right, the text is
    not."""
    path = broken.folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = settings["chat_template"].replace("{{':'}}", "{{': '}}")
    path.write_text(json.dumps(settings))
    report = tiny.climb(renewed(broken))
    assert_first_broken(report, "end_to_end")
    assert "ids differ" in report.summary


def test_another_caption(checkpoint: Path, tiny: Case, broken: Bundle) -> None:
    asked = json.loads(json.dumps(broken.manifest.prompt.caption).replace("Can you", "Please"))

    def change(manifest: Any) -> Any:
        prompt = dataclasses.replace(manifest.prompt, caption=tuple(asked))
        return dataclasses.replace(manifest, prompt=prompt)

    captioned = case(checkpoint, tiny.bundle, "drawn 51x17")
    assert captioned.climb(tiny.bundle).passed
    assert_first_broken(captioned.climb(renewed(broken, change)), "end_to_end")


def test_a_connector_without_a_weight(tiny: Case, broken: Bundle) -> None:
    edit_tensor(broken, "vision_encoder", "modality_projection.proj.weight", lambda w: w * 1.001)
    assert_first_broken(tiny.climb(broken), "vision_features")


def test_tiles_in_another_order(tiny: Case, monkeypatch: Patch) -> None:
    plain = Components.encode_image

    def backwards(self: Components, inputs: Any) -> Any:
        return plain(self, {name: value[:, ::-1] for name, value in inputs.items()})

    monkeypatch.setattr(Components, "encode_image", backwards)
    assert_first_broken(tiny.climb(tiny.bundle), "vision_features")


def test_pictures_in_another_order(tiny: Case, monkeypatch: Patch) -> None:
    plain = Prompter.splice
    monkeypatch.setattr(
        Prompter, "splice", lambda self, ids, images: plain(self, ids, images[::-1])
    )
    assert_first_broken(tiny.climb(tiny.bundle), "end_to_end")
