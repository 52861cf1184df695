"""The layout `fused`: two graphs by their ports and numbers, for one size of pictures."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from tests.errors import raises
from tests.parity.surgery import copied, edit_graph, edit_tensor
from tests.qwen_checkpoints import write_qwen3
from tests.qwen_layouts.conftest import NEW_TOKENS, REQUESTS, Model
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import FUSED, HUB, ImageSize
from vlmport.checkpoint import Checkpoint
from vlmport.errors import BundleError, ExportError, PromptError
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.families.base import SizedLayout
from vlmport.inspection import probe_bundle
from vlmport.parity.ladders.fused import FusedLadder, fused_truth
from vlmport.parity.report import Report
from vlmport.runtime.layouts.fused import TEXT, VISION, Fused
from vlmport.runtime.model import VLM
from vlmport.runtime.probe import check_golden

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}
WIDTHS = {"qwen2_5_vl": 64, "qwen3_vl": 3 * 32}  # of an embedding with its lanes
TOKENS = {"qwen2_5_vl": 24, "qwen3_vl": 20}


def climb(model: Model, bundle: Bundle, name: str, precision: str = "fp32") -> Report:
    graphs, request = Fused.open(bundle, precision=precision), REQUESTS[name]
    truth = fused_truth(model.reference, bundle.manifest, graphs.image_size, request)
    ladder = FusedLadder(graphs, model.reference, request, truth, (0, 1))
    return Report(model.reference.versions, tuple(ladder.climb(precision)))


def ports(path: Path) -> dict[str, tuple[str, list[int | str]]]:
    """Name → type and dimensions, of inputs and outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        one.name: (
            onnx.TensorProto.DataType.Name(one.type.tensor_type.elem_type),
            [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim],
        )
        for one in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("precision", SUFFIXES)
def test_the_ports(model: Model, precision: str) -> None:
    """Exactly these, float16 at the decoder's edges where it computes in float16."""
    folder, suffix, size = model.fused.folder, SUFFIXES[precision], model.size
    width, rows = WIDTHS[model.kind], ["batch_size", "sequence_length"]
    floats = "FLOAT16" if precision == "fp16" else "FLOAT"
    assert ports(folder / f"vision_{size}{suffix}.onnx") == {
        "pixel_values": ("FLOAT", [1, 3, size.height, size.width]),
        "vision_features": ("FLOAT", [TOKENS[model.kind], width]),
    }
    assert ports(folder / f"text_with_image{suffix}.onnx") == {
        "input_ids": ("INT64", rows),
        "attention_mask": ("INT64", rows),
        "image_embeds": (floats, [*rows, width]),
        "logits": (floats, [*rows, 288]),
    }
    assert ports(folder / "image_processor.onnx") == {
        "image": ("UINT8", ["height", "width", 3]),
        "pixel_values": ("FLOAT", [1, 3, size.height, size.width]),
    }


@pytest.mark.parametrize("name", REQUESTS)
def test_every_rung_is_green(model: Model, name: str) -> None:
    """Pixels, features, positions inside, logits and tokens equal PyTorch's."""
    report = climb(model, model.fused, name)
    assert report.passed, report.summary
    assert [row.rung for row in report.rows] == list(FusedLadder.names())


def test_a_request_without_a_picture_says_so(models: dict[str, Model]) -> None:
    model = models["qwen3_vl"]
    rows = {row.rung: row for row in climb(model, model.fused, "text alone").rows}
    assert rows["vision_features"].detail == "no picture"
    assert rows["vision_features"].passed


def test_half_is_green(model: Model) -> None:
    report = climb(model, model.fused, "one picture", "fp16")
    assert report.passed, report.summary


def test_the_rungs_below_logits_are_green_at_8_bits(model: Model) -> None:
    """A random decoder fails at few bits by nature; what is below it does not."""
    rows = climb(model, model.fused, "one picture", "q8").rows
    below = rows[: FusedLadder.names().index("first_logits")]
    assert all(row.passed for row in below), [row.describe() for row in below]


# Each rung can fail


def first_broken(model: Model, bundle: Bundle) -> str | None:
    broken = climb(model, bundle, "one picture").first_broken
    return None if broken is None else broken.rung


def test_a_wrong_weight_shows_on_its_own_rung(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["qwen3_vl"]

    def rows_exchanged(value: np.ndarray) -> np.ndarray:
        value[[1, 2]] = value[[2, 1]]
        return value

    tower = copied(model.fused, tmp_path / "tower")
    tower = edit_tensor(tower, VISION, "visual.pos_embed.weight", rows_exchanged)
    assert first_broken(model, tower) == "vision_features"
    words = copied(model.fused, tmp_path / "words")
    words = edit_tensor(words, TEXT, "embed_tokens.weight", rows_exchanged)
    assert first_broken(model, words) == "embeddings"
    decoder = copied(model.fused, tmp_path / "decoder")
    decoder = edit_tensor(decoder, TEXT, "model.norm.weight", lambda value: value * 1.01)
    assert first_broken(model, decoder) == "first_logits"


def test_positions_of_another_grid_show(models: dict[str, Model], tmp_path: Path) -> None:
    """Height and width exchanged: the tokens are as many."""
    model = models["qwen2_5_vl"]
    size, side = model.size, 7
    grid = [1, size.height // side, size.width // side]

    def turned(graph: onnx.ModelProto) -> None:
        found = 0
        for node in graph.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and list(attribute.ints) == grid:
                    attribute.ints[:] = [1, grid[2], grid[1]]
                    found += 1
        assert found == 1

    bundle = edit_graph(copied(model.fused, tmp_path / "turned"), TEXT, turned)
    assert first_broken(model, bundle) == "first_logits"


def test_a_mask_that_is_not_read_shows(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["qwen2_5_vl"]

    def unread(graph: onnx.ModelProto) -> None:
        """The mask becomes ones, of its own shape."""
        name = "attention_mask"
        for node in graph.graph.node:
            node.input[:] = ["ones" if one == name else one for one in node.input]
        nodes = [
            onnx.helper.make_node("Mul", [name, "nothing"], ["zeros"]),
            onnx.helper.make_node("Add", ["zeros", "something"], ["ones"]),
        ]
        for at, node in enumerate(nodes):
            graph.graph.node.insert(at, node)
        for label, value in (("nothing", 0), ("something", 1)):
            tensor = onnx.numpy_helper.from_array(np.array(value, np.int64), label)
            graph.graph.initializer.append(tensor)

    bundle = edit_graph(copied(model.fused, tmp_path / "unread"), TEXT, unread)
    assert first_broken(model, bundle) == "padded_logits"


# What else it does, and what it refuses


def test_the_probe_agrees(model: Model) -> None:
    assert probe_bundle(model.fused, "cpu", Console(file=io.StringIO()))


def test_a_run_of_fewer_tokens_than_were_recorded_is_named(models: dict[str, Model]) -> None:
    """All that it made may be right: the rest was not compared."""
    bundle = models["qwen3_vl"].fused
    graphs, golden = Fused.open(bundle, precision="fp32"), bundle.manifest.golden
    expected = golden.expected["fp32"]
    longer = dataclasses.replace(expected, tokens=(*expected.tokens, 5))
    assert check_golden(graphs, golden, expected).ok
    report = check_golden(graphs, golden, longer)
    assert report.problems == ("4 tokens were made, recorded were 5",)


def test_image_tokens_must_come_by_whole_pictures(models: dict[str, Model]) -> None:
    graphs = Fused.open(models["qwen3_vl"].fused, precision="fp32")
    features = np.zeros((20, 96), np.float32)
    ids = np.append(graphs.prompt_ids(), 5)
    assert graphs.logits(ids, features).shape == (21, 288)
    with raises(PromptError, "prompt.wrong-features", "19", "20"):
        graphs.logits(ids[1:], features)
    with raises(PromptError, "prompt.wrong-features", "20"):
        graphs.logits(ids[1:], features[1:])
    feeds = {
        "input_ids": ids[None, 1:],
        "attention_mask": np.ones((1, 20), np.int64),
        "image_embeds": np.zeros((1, 20, 96), np.float32),
    }
    with raises(PromptError, "prompt.refused", "20") as caught:
        graphs.run(TEXT, feeds)
    assert caught.value.hint is not None
    assert "takes 20 of them" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "message", "hint"),
    [
        ("81x64", "image size 81x64: both sides must be multiples of 16", "such as 80x64"),
        ("7x9", "both sides must be multiples of 16", "such as 16x16"),
        ("80", "image size '80': expected WIDTHxHEIGHT", "such as 672x672"),
        ("0x64", "expected WIDTHxHEIGHT", "such as 672x672"),
        ("1600x1600", "image size 1600x1600: 10000 tokens, the context has 4096", "smaller"),
    ],
)
def test_sizes_that_are_refused(
    models: dict[str, Model], tmp_path: Path, size: str, message: str, hint: str
) -> None:
    checkpoint = models["qwen3_vl"].checkpoint
    with pytest.raises(ExportError, match=message) as caught:
        export(checkpoint, tmp_path / "out", layout=FUSED, image_size=size)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_picture_that_leaves_no_room_for_words_is_refused(tmp_path: Path) -> None:
    """Not by the probe, after all has been written."""
    for context, words in ((82, "81 tokens, the context has 82, of which a question"), (97, "")):
        settings = {"max_position_embeddings": context}
        checkpoint = write_qwen3(tmp_path / f"{context}", text=settings)
        form = family_of(Checkpoint.open(checkpoint)).layouts[FUSED]
        assert isinstance(form, SizedLayout)
        if words:
            with pytest.raises(ExportError, match=words):
                form.at(ImageSize(144, 144))
        else:
            assert form.at(ImageSize(144, 144)).image_tokens == 81


def test_other_layouts_take_no_size(models: dict[str, Model], tmp_path: Path) -> None:
    with raises(ExportError, "layout.wrong-image-size", "'hub'"):
        export(models["qwen3_vl"].checkpoint, tmp_path / "out", layout=HUB, image_size="80x64")


def test_a_size_is_width_first() -> None:
    assert ImageSize.parse("672x448") == ImageSize(672, 448)
    assert str(ImageSize(672, 448)) == "672x448"


def test_the_runtime_names_the_layout_that_it_runs(models: dict[str, Model]) -> None:
    with raises(BundleError, "bundle.other-layout", "'fused'", "'hub'"):
        VLM.open(models["qwen3_vl"].fused)


def test_answers_are_as_long_as_the_checkpoint_says(models: dict[str, Model]) -> None:
    assert models["qwen3_vl"].fused.manifest.generation.max_new_tokens == NEW_TOKENS
