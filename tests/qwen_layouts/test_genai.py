"""The layout `genai`: onnxruntime-genai's files, and its graphs against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.errors import raises
from tests.parity.surgery import copied, edit_graph, edit_tensor
from tests.qwen_checkpoints import write_qwen3
from tests.qwen_layouts.conftest import REQUESTS, Model
from vlmport.bundle import Bundle
from vlmport.checkpoint import Checkpoint
from vlmport.errors import PromptError
from vlmport.families import family_of
from vlmport.families.base import Layout
from vlmport.parity.judging import max_new_tokens
from vlmport.parity.ladders.genai import GenaiLadder
from vlmport.parity.report import Report
from vlmport.parity.truth import Truth
from vlmport.runtime.graphs.positions import Positions
from vlmport.runtime.layouts.genai import DECODER, EMBEDDING, GenaiGraphs

WIDTHS = {"qwen2_5_vl": 64, "qwen3_vl": 3 * 32}  # of an embedding with its lanes
PATCHES = {"qwen2_5_vl": 3 * 2 * 7 * 7, "qwen3_vl": 3 * 2 * 8 * 8}


def climb(model: Model, bundle: Bundle, name: str, precision: str = "fp32") -> Report:
    graphs, request = GenaiGraphs.open(bundle, precision=precision), REQUESTS[name]
    most, token = max_new_tokens(bundle.manifest), bundle.manifest.prompt.image_token_id
    truth = Truth.of(model.reference, request, most, token)
    ladder = GenaiLadder(graphs, model.reference, request, truth, (0, 1))
    return Report(model.reference.versions, tuple(ladder.climb(precision)))


@pytest.mark.parametrize("name", REQUESTS)
def test_every_rung_is_green(model: Model, name: str) -> None:
    report = climb(model, model.genai, name)
    assert report.passed, report.summary
    assert [row.rung for row in report.rows] == list(GenaiLadder.names())


def test_half_is_green(model: Model) -> None:
    report = climb(model, model.genai, "one picture", "fp16")
    assert report.passed, report.summary


def test_a_wrong_weight_shows_on_its_own_rung(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["qwen3_vl"]

    def rows_exchanged(value: np.ndarray) -> np.ndarray:
        value[[1, 2]] = value[[2, 1]]
        return value

    words = copied(model.genai, tmp_path / "words")
    words = edit_tensor(words, EMBEDDING, "embed_tokens.weight", rows_exchanged)
    decoder = copied(model.genai, tmp_path / "decoder")
    decoder = edit_tensor(decoder, DECODER, "model.norm.weight", lambda value: value * 1.01)
    for bundle, rung in ((words, "merged_embeds"), (decoder, "first_logits")):
        broken = climb(model, bundle, "one picture").first_broken
        assert broken is not None
        assert broken.rung == rung


def test_features_over_the_wrong_rows_show(models: dict[str, Model], tmp_path: Path) -> None:
    """The first feature over every image token."""
    model = models["qwen2_5_vl"]

    def always_the_first(graph: onnx.ModelProto) -> None:
        (sums,) = (node for node in graph.graph.node if node.op_type == "CumSum")
        node = onnx.helper.make_node("Sign", [sums.output[0]], ["first"])
        for user in graph.graph.node:
            if user is not sums:
                user.input[:] = ["first" if one == sums.output[0] else one for one in user.input]
        at = [*graph.graph.node].index(sums)
        graph.graph.node.insert(at + 1, node)

    bundle = edit_graph(copied(model.genai, tmp_path / "rows"), EMBEDDING, always_the_first)
    broken = climb(model, bundle, "one picture").first_broken
    assert broken is not None
    assert broken.rung == "merged_embeds"


def test_an_image_token_without_a_feature_is_refused(models: dict[str, Model]) -> None:
    """The client would write what it likes there; a text is embedded by itself."""
    graphs = GenaiGraphs.open(models["qwen3_vl"].genai, precision="fp32")
    token = graphs.manifest.prompt.image_token_id
    assert graphs.embed(np.array([1, 2])).shape == (2, 96)
    with raises(PromptError, "prompt.refused", "image_features") as caught:
        graphs.embed(np.array([1, token]))
    assert "and of no others" in (caught.value.hint or "")


def test_greedy_takes_positions_on_one_axis_too(models: dict[str, Model], tmp_path: Path) -> None:
    """As a decoder of plain rotary embeddings has them; three equal axes say the same of a text."""

    def of_one_axis(model: onnx.ModelProto) -> None:
        (port,) = (one for one in model.graph.input if one.name == "position_ids")
        del port.type.tensor_type.shape.dim[0]
        for node in model.graph.node:
            node.input[:] = ["three" if one == port.name else one for one in node.input]
        first = onnx.numpy_helper.from_array(np.array([0]), "first")
        model.graph.initializer.append(first)
        nodes = [
            onnx.helper.make_node("Unsqueeze", [port.name, "first"], ["one"]),
            onnx.helper.make_node("Concat", ["one"] * 3, ["three"], axis=0),
        ]
        for at, node in enumerate(nodes):
            model.graph.node.insert(at, node)

    whole = models["qwen2_5_vl"].genai
    flat = edit_graph(copied(whole, tmp_path / "flat"), DECODER, of_one_axis)
    three = GenaiGraphs.open(whole, precision="fp32")
    one = GenaiGraphs.open(flat, precision="fp32")
    embeds, places = three.embed(np.arange(40, 60)), np.arange(20)
    for offset in (0, 7):
        tokens, logits = three.greedy(embeds, Positions(np.stack([places] * 3), offset), 6)
        assert one.greedy(embeds, Positions(places, offset), 6)[0] == tokens
        np.testing.assert_array_equal(one.greedy(embeds, Positions(places, offset), 6)[1], logits)


def test_padding_that_a_prompt_holds_shows(models: dict[str, Model], tmp_path: Path) -> None:
    """The client masks what has the padding's id: `<|im_end|>`, where files name no other."""
    model = models["qwen3_vl"]
    name = "two pictures, two turns"
    bundle = copied(model.genai, tmp_path / "padded")
    path = bundle.folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["pad_token_id"] = config["model"]["eos_token_id"][0]
    path.write_text(json.dumps(config))
    failed = climb(model, bundle, name).failures
    assert [row.rung for row in failed][:3] == ["position_ids", "first_logits", "cached_decode"]
    del config["model"]["pad_token_id"]
    path.write_text(json.dumps(config))
    broken = climb(model, bundle, name).first_broken
    assert broken is not None
    assert "pad_token_id" in (broken.error or "")


ENDS = {"eos_token_id": 263, "pad_token_id": None}


@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({}, 287),  # the last row of 288, of which 269 have a token
        ({"generation": ENDS}, 287),
        ({"generation": {"eos_token_id": [263, 287]}}, 286),
        ({"text": {"vocab_size": 269}}, 269),  # no row to spare
    ],
)
def test_the_padding_is_no_token(tmp_path: Path, settings: dict[str, Any], pad: int) -> None:
    family = family_of(Checkpoint.open(write_qwen3(tmp_path / "model", **settings)))
    form = family.layouts["genai"]
    assert isinstance(form, Layout)
    files = dict.fromkeys(("decoder", "embedding", "vision"), "x")
    config = form.client_files(files)["genai_config.json"]
    assert config["model"]["pad_token_id"] == pad


# What the client reads


def dims(folder: Path, name: str) -> dict[str, list[Any]]:
    graph = onnx.load(folder / name, load_external_data=False).graph
    return {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.output)
    }


def test_the_config_names_what_the_graphs_have(model: Model) -> None:
    """Every file, input and output; and the widths, which the client takes from the config."""
    folder, width = model.genai.folder, WIDTHS[model.kind]
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    assert config["type"] == model.kind
    for part in ("vision", "embedding", "decoder"):
        section = config[part]
        found = dims(folder, section["filename"])
        wanted = {*section["inputs"].values(), *section["outputs"].values()}
        layers = range(config["decoder"]["num_hidden_layers"])
        assert found.keys() == {name.replace("%d", str(i)) for name in wanted for i in layers}
    decoder = config["decoder"]
    found = dims(folder, decoder["filename"])
    assert found["inputs_embeds"] == ["batch_size", "sequence_length", width]
    assert decoder["hidden_size"] == width
    assert found["logits"] == ["batch_size", 1, config["vocab_size"]]
    assert found["position_ids"] == [3, "batch_size", "sequence_length"]
    cache = [decoder["num_key_value_heads"], "past_sequence_length", decoder["head_size"]]
    assert found["past_key_values.0.key"] == ["batch_size", *cache]
    vision = dims(folder, config["vision"]["filename"])
    assert vision["pixel_values"] == ["num_patches", PATCHES[model.kind]]
    assert vision["image_features"] == ["num_features", width]


def test_it_opens_what_auto_stands_for_on_the_cpu(model: Model) -> None:
    folder, auto = model.genai.folder, model.genai.manifest.auto["cpu"]
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    for part in ("vision", "embedding", "decoder"):
        variant = model.genai.variant(part, auto[part])
        assert config[part]["filename"] == variant.model


def test_ids_and_limits_are_the_checkpoints(model: Model) -> None:
    folder, manifest = model.genai.folder, model.genai.manifest
    config = json.loads((folder / "genai_config.json").read_text())
    source = json.loads((model.checkpoint / "config.json").read_text())
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        assert config["model"][name] == source[name]
    assert config["model"]["eos_token_id"] == list(manifest.generation.stop_token_ids)
    assert config["search"]["max_length"] == 4096
    steps = json.loads((folder / "processor_config.json").read_text())["processor"]["transforms"]
    attributes = {one["operation"]["type"]: one["operation"].get("attrs") for one in steps}
    assert attributes["Resize"]["min_pixels"] == manifest.image_options["min_pixels"]
    assert attributes["Resize"]["max_pixels"] == manifest.image_options["max_pixels"]
    assert attributes["Resize"]["interpolation"] == "CUBIC"
    assert attributes["Normalize"][model.kind] == 1
