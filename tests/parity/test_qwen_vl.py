"""The ladder on Qwen2.5-VL and Qwen3-VL: whole ones pass at every grid, each fault has its rung."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.checkpoints import write_json
from tests.parity.conftest import Case
from tests.parity.qwen import TURNS, WRITERS, Family, Write, made
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.thorough import cells
from vlmport.bundle import Bundle
from vlmport.checkpoint import Checkpoint
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.parity import verify
from vlmport.parity.ladders import run_ladder
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.pictures import drawn_pictures
from vlmport.parity.references import load_reference
from vlmport.parity.report import Report
from vlmport.runtime.model import VLM
from vlmport.runtime.probe import golden_image

# Eight grids; other limits twice; two pictures over two turns, three at once; text alone twice.
REQUESTS = 14
SOME = ("drawn 120x300", TURNS)


def some_rows(family: Family, bundle: Bundle, *precisions: str) -> Report:
    requests = [one for one in family.reference.requests(drawn_pictures()) if one.name in SOME]
    assert len(requests) == len(SOME)
    return Report("", run_ladder(family.reference, bundle, precisions, requests))


@pytest.mark.parametrize("name", WRITERS)
def test_green(qwens: dict[str, Family], name: str) -> None:
    """All rungs at eight grids, other limits, one to three pictures, turns and text alone."""
    family = qwens[name]
    report = verify(family.bundle, family.checkpoint)
    assert report.passed, report.summary
    assert len(report.rows) == REQUESTS * len(HubLadder.rungs)
    assert len({row.image for row in report.rows}) == REQUESTS


@pytest.mark.parametrize("name", WRITERS)
def test_the_requests_have_eight_grids_and_none_is_the_golden_one(
    qwens: dict[str, Family], name: str
) -> None:
    family = qwens[name]
    requests = [one for one in family.reference.requests(drawn_pictures()) if one.is_caption]
    grids = {
        tuple(family.reference.pixels(one.images[0])["image_grid_thw"].ravel().tolist())
        for one in requests
    }
    assert len(grids) == len(requests) == 8
    assert any(height != width for _, height, width in grids)
    with VLM.open(family.bundle) as model:
        golden = family.bundle.manifest.golden
        shown = model.components.process_image(golden_image(golden), golden.options)
    assert tuple(shown.inputs["image_grid_thw"].ravel().tolist()) not in grids


VARIANTS: dict[str, tuple[Write, dict[str, Any]]] = {
    "2.5: transformers 5, bf16, shards, tied": (
        write_qwen2_5,
        {
            "spelling": "v5",
            "dtype": "BF16",
            "shards": 3,
            "config": {"tie_word_embeddings": True},
        },
    ),
    "2.5: other heads, windows, patches and merge": (
        write_qwen2_5,
        {
            "vision": {
                "hidden_size": 36,
                "num_heads": 3,
                "intermediate_size": 37,
                "patch_size": 5,
                "spatial_merge_size": 3,
                "temporal_patch_size": 1,
                "window_size": 37,  # 2 x 2 merged patches and a rest
                "fullatt_block_indexes": [],
            },
            "text": {
                "hidden_size": 96,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "rope_scaling": {"type": "mrope", "mrope_section": [4, 1, 3]},
                "rope_theta": 300.0,
                "rms_norm_eps": 1e-3,
            },
        },
    ),
    "2.5: new names in an old config, whole blocks only": (
        write_qwen2_5,
        {"names": "model.visual", "vision": {"fullatt_block_indexes": [0, 1, 2]}, "dtype": "F16"},
    ),
    "3: transformers 5, bf16, shards, tied": (
        write_qwen3,
        {
            "spelling": "v5",
            "dtype": "BF16",
            "shards": 3,
            "config": {"tie_word_embeddings": True},
        },
    ),
    "3: other heads, lanes, patches and merge": (
        write_qwen3,
        {
            "vision": {
                "hidden_size": 24,
                "num_heads": 2,
                "patch_size": 5,
                "spatial_merge_size": 3,
                "temporal_patch_size": 1,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [3, 0, 2],
                "hidden_act": "gelu",
            },
            "text": {
                "head_dim": 24,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "attention_bias": True,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 4, 6]},
                "rope_theta": 300.0,
                "rms_norm_eps": 1e-3,
            },
        },
    ),
    "3: no lanes": (
        write_qwen3,
        {"vision": {"deepstack_visual_indexes": []}, "dtype": "F16"},
    ),
}


@pytest.mark.parametrize(("write", "settings"), VARIANTS.values(), ids=VARIANTS)
def test_variants_are_green(tmp_path: Path, write: Write, settings: dict[str, Any]) -> None:
    family = made(tmp_path, write, **settings)
    report = some_rows(family, family.bundle, "fp32")
    assert report.passed, report.summary


@pytest.mark.parametrize("name", cells("qwen3", rest=("qwen2_5",)))
def test_eight_bits_and_half(qwens: dict[str, Family], name: str, tmp_path: Path) -> None:
    """Random weights bear 8 bits and float16; what 4 bits do to them says nothing."""
    family = qwens[name]
    bundle = export(family.checkpoint, tmp_path / "bundle", precisions=("q8", "fp16", "q4f16"))
    report = some_rows(family, bundle, "q8", "fp16")
    assert report.passed, report.summary
    exact = {"prompt_ids", "pixels", "position_ids", "merged_embeds"}
    assert {row.rung for row in some_rows(family, bundle, "q4f16").failures}.isdisjoint(exact)


@pytest.mark.parametrize("name", WRITERS)
def test_the_case_shows_something(qwen_cases: dict[str, Case], name: str) -> None:
    case = qwen_cases[name]
    assert case.climb(case.bundle).passed
    assert len(case.truth.pictures) == 2
    assert len(set(case.truth.made.tokens.tolist())) > 4
    assert case.truth.offset < 0
    time, height, width = case.truth.position_ids
    assert (time != height).any()
    assert (height != width).any()


@pytest.mark.parametrize("name", WRITERS)
def test_pictures_of_one_call_do_not_see_each_other(qwens: dict[str, Family], name: str) -> None:
    """Three at once, whose grids differ: what transformers makes of the same call."""
    reference = qwens[name].reference
    pictures = [reference.pixels(one.image) for one in drawn_pictures()]
    inputs = {key: np.concatenate([one[key] for one in pictures]) for key in pictures[0]}
    truth = reference.vision_features(inputs)
    with VLM.open(qwens[name].bundle) as model:
        (features,) = model.components.session("vision_encoder").run(None, inputs)
    np.testing.assert_allclose(np.asarray(features), truth, atol=1e-5 * np.abs(truth).max())


def test_stop_ids_that_generation_config_alone_names(tmp_path: Path) -> None:
    """The text config of Qwen3-VL need not have any, nor does transformers' class."""
    folder = write_qwen3(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    del raw["text_config"]["eos_token_id"]
    write_json(folder / "config.json", raw)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    reference = load_reference(folder, image_token_id=raw["image_token_id"])
    assert reference.stop_token_ids == tuple(stops)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json", None])
@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("write", [write_qwen2_5, write_qwen3])
def test_stop_ids_of_tokenizer_and_template_are_the_exports(
    tmp_path: Path, write: Write, newer: bool, where: str | None
) -> None:
    """Beside the one of generation_config.json; newer tokenizers have all in tokenizer_config.json,
    and one that names none has its class's."""
    folder = write(tmp_path / "model")
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    other = known.token_to_id("<|vision_start|>")
    generation = json.loads((folder / "generation_config.json").read_text())
    write_json(folder / "generation_config.json", {**generation, "eos_token_id": other})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("eos_token")
        if name == where:
            settings["eos_token"] = "<|im_start|>"
        if newer and name == "tokenizer_config.json":
            settings["added_tokens_decoder"] = {
                str(number): {"content": token.content, "special": token.special}
                for number, token in known.get_added_tokens_decoder().items()
            }
        write_json(folder / name, settings)
    found = family_of(Checkpoint.open(folder)).generation.stop_token_ids
    image = known.token_to_id("<|image_pad|>")
    assert load_reference(folder, image_token_id=image).stop_token_ids == found
    read = where == "tokenizer_config.json" or (where is not None and not newer)
    token = "<|im_start|>" if read else "<|endoftext|>"
    assert found == (other, known.token_to_id(token), known.token_to_id("<|im_end|>"))
