"""The layout `components`: distilvit2's four files, by their names, ports and numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.checkpoints import (
    prefix_config,
    write_json,
    write_prefix_checkpoint,
    write_tokenizer,
    write_weights,
)
from tests.errors import raises
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import COMPONENTS
from vlmport.checkpoint import Checkpoint
from vlmport.errors import BundleError, ExportError, WeightError
from vlmport.exporter import export
from vlmport.families.prefix.family import PrefixCaptioner
from vlmport.graph.builder import to_model
from vlmport.graph.parameters import Weight
from vlmport.graph.precision import PRECISIONS
from vlmport.runtime.layouts.components import FourFiles
from vlmport.runtime.model import VLM

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
GRAPHS = {
    "vision_encoder": "vision_encoder/model{}.onnx",
    "projection": "projection{}.onnx",
    "prefix_init": "prefix_init{}.onnx",
    "language_model": "language_model/model{}.onnx",
}
CACHE = [f"{i}.{half}" for i in range(2) for half in ("key", "value")]
PAST = ["batch_size", 2, "past_sequence_length", 8]
PORTS: dict[str, tuple[dict[str, list[Any]], dict[str, list[Any]]]] = {
    "vision_encoder": (
        {"pixel_values": ["batch_size", 3, 30, 30]},
        {"last_hidden_state": ["batch_size", 25, 32], "pooler_output": ["batch_size", 32]},
    ),
    "projection": (
        {"vision_hidden_states": ["batch", "sequence", 32]},
        {"projected_prefix": ["batch", "sequence", 32]},
    ),
    "prefix_init": (
        {
            "prefix_embeddings": ["batch", "prefix_sequence", 32],
            "input_ids": ["batch", "text_sequence"],
        },
        {
            "logits": ["batch", "total_sequence", 113],
            **{f"present.{name}": ["batch", 2, "total_sequence", 8] for name in CACHE},
        },
    ),
    "language_model": (
        {
            "input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", "total_sequence_length"],
            "position_ids": ["batch_size", "sequence_length"],
            **{f"past_key_values.{name}": PAST for name in CACHE},
        },
        {
            "logits": ["batch_size", "sequence_length", 113],
            **{f"present.{name}": ["batch_size", 2, "total_sequence_length", 8] for name in CACHE},
        },
    ),
}


@pytest.fixture(scope="module")
def four(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint in every precision, not to be changed."""
    out = tmp_path_factory.mktemp("layouts") / "four"
    return export(tiny_checkpoint, out, precisions=list(SUFFIXES), layout=COMPONENTS)


def test_the_files_are_distilvit2s(four: Bundle) -> None:
    found = {p.relative_to(four.folder).as_posix() for p in four.folder.rglob("*") if p.is_file()}
    graphs = {path.format(suffix) for path in GRAPHS.values() for suffix in SUFFIXES.values()}
    data = {f"language_model/model{suffix}.onnx_data" for suffix in SUFFIXES.values()}
    others = {
        "README.md",
        "config.json",
        "generation_config.json",
        "image_processor.onnx",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vlmport.json",
    }
    assert found == graphs | data | others
    assert four.manifest.layout == "components"
    assert json.loads((four.folder / "vlmport.json").read_text())["layout"] == "components"
    config = json.loads((four.folder / "config.json").read_text())
    assert config["model_type"] == "prefix_conditioning_vlm"
    assert not any(key.startswith("lora") for key in config)  # it is merged


@pytest.mark.parametrize("suffix", SUFFIXES.values())
@pytest.mark.parametrize("component", GRAPHS)
def test_inputs_and_outputs(four: Bundle, component: str, suffix: str) -> None:
    model = onnx.load(four.folder / GRAPHS[component].format(suffix), load_external_data=False)
    graph = model.graph
    for ports, expected in zip((graph.input, graph.output), PORTS[component], strict=True):
        found = {
            port.name: [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
            for port in ports
        }
        assert found == expected
        half = suffix in ("_fp16", "_q4f16")
        for port in ports:
            kind = onnx.TensorProto.DataType.Name(port.type.tensor_type.elem_type)
            whole = "ids" in port.name or "mask" in port.name
            cache = port.name.startswith(("past_key_values", "present"))
            assert kind == ("INT64" if whole else "FLOAT16" if cache and half else "FLOAT")


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_the_decoders_weights_are_stored_once(four: Bundle, suffix: str) -> None:
    """prefix_init names what language_model stores, downwards and by no link."""
    path = four.folder / f"prefix_init{suffix}.onnx"
    begin = onnx.load(path, load_external_data=False).graph.initializer
    go_on = onnx.load(
        four.folder / f"language_model/model{suffix}.onnx", load_external_data=False
    ).graph.initializer
    stored = {tensor.name: entries(tensor) for tensor in go_on if tensor.external_data}
    borrowed = {tensor.name: entries(tensor) for tensor in begin if tensor.external_data}
    assert stored.keys() == borrowed.keys()
    assert stored
    for name, place in borrowed.items():
        location = place.pop("location")
        assert location == f"language_model/model{suffix}.onnx_data"
        assert place == {k: v for k, v in stored[name].items() if k != "location"}
    assert sum(len(tensor.raw_data) for tensor in begin) < 20_000  # small ones are in both
    assert not any(one.is_symlink() for one in four.folder.rglob("*"))
    kinds = {name.partition("_quantized")[0] for name in stored if "embed" in name}
    assert not kinds, "a tied embedding is looked up in the head's matrix"


def entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {one.key: one.value for one in tensor.external_data}


def test_an_untied_embedding_is_stored_beside_the_head(tmp_path: Path) -> None:
    checkpoint = write_prefix_checkpoint(
        tmp_path / "checkpoint", text={"tie_word_embeddings": False}
    )
    out = export(checkpoint, tmp_path / "out", precisions="q4", layout=COMPONENTS)
    model = onnx.load(out.folder / "prefix_init_q4.onnx", load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    assert "language_model.model.embed_tokens.weight_quantized" in names
    assert "language_model.lm_head.weight_quantized" in names


@pytest.mark.parametrize("precision", SUFFIXES)
def test_no_ids_some_ids_and_steps_agree(four: Bundle, precision: str) -> None:
    """The same rows, whether ids come with the prefix, after it, or one by one."""
    files = FourFiles.open(four, precision=precision)
    rng = np.random.default_rng(0)
    prefix, ids = rng.standard_normal((7, 32)).astype("f4"), rng.integers(0, 113, 5)
    whole, _ = files.begin(prefix, ids)
    first, cache = files.begin(prefix, ids[:0])
    assert first.shape == (7, 113)
    rest = [files.go_on(ids[:2], cache)]
    for at in range(2, 5):
        rest.append(files.go_on(ids[at : at + 1], rest[-1][1]))
    parts = np.concatenate([first, *(logits for logits, _ in rest)])
    assert parts.shape == whole.shape == (12, 113)
    # q8 scales activations by all rows of a call.
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "q8": 0.3}.get(precision, 1e-2)
    assert np.abs(parts - whole).max() < tolerance * whole.std()


def test_rows_of_a_batch_are_their_own(four: Bundle) -> None:
    begin = ort.InferenceSession(four.folder / "prefix_init.onnx")
    go_on = ort.InferenceSession(four.folder / "language_model/model.onnx")
    rng = np.random.default_rng(1)
    prefix = rng.standard_normal((3, 6, 32)).astype("f4")
    ids = rng.integers(0, 113, (3, 2))
    names = [one.name for one in begin.get_outputs()]
    past = [name.replace("present", "past_key_values") for name in names[1:]]

    def both(rows: slice) -> np.ndarray:
        feeds = {"prefix_embeddings": prefix[rows], "input_ids": ids[rows]}
        logits, *cache = begin.run(names, feeds)
        count = len(logits)
        step = {
            "input_ids": ids[rows, :1],
            "attention_mask": np.ones((count, 9), np.int64),
            "position_ids": np.full((count, 1), 8),
            **dict(zip(past, cache, strict=True)),
        }
        return np.concatenate([logits, go_on.run(["logits"], step)[0]], axis=1)

    together = both(slice(0, 3))
    for row in range(3):
        np.testing.assert_allclose(together[row], both(slice(row, row + 1))[0], atol=1e-5)


def test_without_a_pooling_head_there_is_no_pooler_output(tmp_path: Path) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "c", vision={"vision_use_head": False})
    out = export(checkpoint, tmp_path / "out", precisions="fp32", layout=COMPONENTS)
    graph = onnx.load(out.folder / "vision_encoder/model.onnx").graph
    assert [one.name for one in graph.output] == ["last_hidden_state"]
    pixels = np.zeros((1, 3, 30, 30), np.float32)
    assert FourFiles.open(out).encode(pixels).pooled is None


def test_a_head_that_the_weights_lack_is_named(tmp_path: Path) -> None:
    """The Hub's layout does not read it; this one has to."""
    checkpoint = write_prefix_checkpoint(tmp_path / "c", vision={"vision_use_head": False})
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    export(checkpoint, tmp_path / "hub", precisions="fp32")
    with pytest.raises(WeightError, match=r"vision_encoder\.head\.attention\.v_proj\.weight"):
        export(checkpoint, tmp_path / "out", precisions="fp32", layout=COMPONENTS)
    assert not (tmp_path / "out").exists()


def test_the_same_bytes_twice(four: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    again = export(tiny_checkpoint, tmp_path / "four", precisions=list(SUFFIXES), layout=COMPONENTS)
    assert again.manifest == four.manifest


def test_the_real_size_in_8_bits_is_what_distilvit2_promises(tmp_path: Path) -> None:
    """SigLIP-base-224 and SmolLM-135M, pooling head and all: 226 MB. Sizes need no weights."""
    vision = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"intermediate_size": 3072, "image_size": 224, "patch_size": 16}
    text = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    text |= {"num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536}
    config = prefix_config("v4", "linear", "BF16", vision, text | {"vocab_size": 49152})
    write_json(tmp_path / "config.json", config)
    write_tokenizer(tmp_path)
    write_weights(tmp_path, {"none": np.zeros(1)})
    layout = PrefixCaptioner.read(Checkpoint.open(tmp_path)).layouts[COMPONENTS]
    graphs = layout.fixed_graphs() | layout.graphs(PRECISIONS["q8"])
    sizes = {
        name: written_size(to_model(graph), layout.shared.get(name))
        for name, graph in graphs.items()
    }
    assert 225_000_000 < sum(sizes.values()) <= 226_000_000, sizes
    assert sizes["prefix_init"] < 400_000


def written_size(model: ir.Model, owner: str | None) -> int:
    """Bytes of a graph and of its weights, where these are not another's."""
    weights = 0
    for value in model.graph.initializers.values():
        if not isinstance(value, Weight):
            continue
        size = math.prod(value.shape.numpy()) * value.dtype.itemsize
        where = "language_model/model_quantized.onnx_data"
        value.const_value = ir.ExternalTensor(
            where, 10**8, size, value.dtype, shape=value.shape, name=value.name
        )
        weights += size if owner is None else 0
    return weights + len(ir.to_proto(model).SerializeToString())


def test_auto_takes_the_fast_form_for_many_rows_and_for_one(four: Bundle) -> None:
    """On a CPU: bytes times bytes where a picture's patches go through, 4 bits to decode."""
    assert four.manifest.auto["cpu"] == {
        "image_processor": "any",
        "vision_encoder": "q8",
        "projection": "q8",
        "language_model": "q4",
        "prefix_init": "q4",
    }


# What it is not


def test_an_unknown_layout(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with raises(ExportError, "layout.unknown", "'component'", "'comp") as e:
        export(tiny_checkpoint, tmp_path / "out", layout="component")
    assert "hub, components" in (e.value.hint or "")


def test_the_runtime_says_which_layout_it_is(four: Bundle, tiny_bundle: Path) -> None:
    with raises(BundleError, "bundle.other-layout", "'components'", "'hub'"):
        VLM.open(four)
    with raises(BundleError, "bundle.other-layout", "'hub'", "'components'"):
        FourFiles.open(tiny_bundle)


def test_a_layout_of_a_later_version(four: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(four.folder, tmp_path / "later"))
    manifest = json.loads((folder / "vlmport.json").read_text())
    (folder / "vlmport.json").write_text(json.dumps(manifest | {"layout": "fused9"}))
    with raises(BundleError, "bundle.newer-version", "'fused9'"):
        Bundle.open(folder)


def test_a_component_too_few(four: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(four.folder, tmp_path / "less"))
    manifest = json.loads((folder / "vlmport.json").read_text())
    del manifest["components"]["prefix_init"]
    (folder / "vlmport.json").write_text(json.dumps(manifest))
    with raises(BundleError, "bundle.malformed", "components", "prefix_init"):
        Bundle.open(folder)
