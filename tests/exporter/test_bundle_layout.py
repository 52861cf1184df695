"""A bundle's files, and the graphs' names, sizes and types: the Hub's contract and our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto
from PIL import Image
from tokenizers import Tokenizer

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.errors import raises
from vlmport.bundle import Bundle, hash_folder
from vlmport.errors import ExportError
from vlmport.exporter import export
from vlmport.families import FAMILIES
from vlmport.runtime.model import VLM

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vlmport.json",
    "onnx/image_processor.onnx",
    "onnx/vision_encoder.onnx",
    "onnx/vision_encoder_quantized.onnx",
    "onnx/vision_encoder_q4.onnx",
    "onnx/embed_tokens.onnx",
    "onnx/embed_tokens_quantized.onnx",
    "onnx/embed_tokens_q4.onnx",
    "onnx/decoder_model_merged.onnx",
    "onnx/decoder_model_merged_quantized.onnx",
    "onnx/decoder_model_merged_q4.onnx",
}
GRAPHS = sorted(name for name in FILES if name.endswith(".onnx"))
PAST = ["batch_size", 2, "past_sequence_length", 8]
PRESENT = ["batch_size", 2, "total_sequence_length", 8]
PORTS: dict[str, tuple[dict[str, list[Any]], dict[str, list[Any]]]] = {
    "image_processor": (
        {"image": ["height", "width", 3]},
        {"pixel_values": [1, 3, 30, 30], "prompt_ids": [25]},
    ),
    "vision_encoder": (
        {"pixel_values": ["batch_size", 3, 30, 30]},
        {"image_features": ["num_features", 32]},
    ),
    "embed_tokens": (
        {"input_ids": ["batch_size", "sequence_length"]},
        {"inputs_embeds": ["batch_size", "sequence_length", 32]},
    ),
    "decoder_model_merged": (
        {
            "inputs_embeds": ["batch_size", "sequence_length", 32],
            "attention_mask": ["batch_size", "total_sequence_length"],
            "position_ids": ["batch_size", "sequence_length"],
            "num_logits_to_keep": [],
            "past_key_values.0.key": PAST,
            "past_key_values.0.value": PAST,
            "past_key_values.1.key": PAST,
            "past_key_values.1.value": PAST,
        },
        {
            "logits": ["batch_size", "num_logits", 113],
            "present.0.key": PRESENT,
            "present.0.value": PRESENT,
            "present.1.key": PRESENT,
            "present.1.value": PRESENT,
        },
    ),
}


def load(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(bundle / name)


def test_the_files_are_the_hubs(tiny_bundle: Path) -> None:
    found = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert found == FILES


def test_the_manifest_lists_every_file_and_the_hashes_hold(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=True)
    assert set(bundle.manifest.files) == FILES - {"vlmport.json", "README.md"}
    assert bundle.manifest.files == hash_folder(tiny_bundle)
    assert bundle.manifest.precisions == ("fp32", "q8", "q4")
    assert bundle.manifest.family in {family.name for family in FAMILIES}
    assert bundle.manifest.name == "captioner"


def test_one_precision_writes_its_files_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(tiny_checkpoint, tmp_path / "out", precisions="q4")
    names = {name for name in bundle.manifest.files if name.startswith("onnx/")}
    assert names == {n for n in GRAPHS if "_q4" in n or "image_processor" in n}
    assert bundle.manifest.precisions == ("q4",)
    assert bundle.manifest.auto["cuda"]["vision_encoder"] == "q4"
    assert set(bundle.manifest.golden.expected) == {"q4"}


@pytest.mark.parametrize("file", GRAPHS)
def test_inputs_and_outputs_have_the_contracts_names(tiny_bundle: Path, file: str) -> None:
    graph = load(tiny_bundle, file).graph
    inputs, outputs = PORTS[Path(file).stem.removesuffix("_q4").removesuffix("_quantized")]
    assert {port.name: dims(port) for port in graph.input} == inputs
    assert {port.name: dims(port) for port in graph.output} == outputs


def dims(port: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]


@pytest.mark.parametrize("file", GRAPHS)
def test_graphs_are_valid_and_bare(tiny_bundle: Path, file: str) -> None:
    onnx.checker.check_model(str(tiny_bundle / file))
    model = load(tiny_bundle, file)
    assert model.ir_version == 10
    assert {one.domain: one.version for one in model.opset_import} == {"": 23, "com.microsoft": 1}
    assert model.producer_name == "vlmport"
    for node in all_nodes(model.graph):
        assert not node.metadata_props
        assert not node.doc_string
    assert str(tiny_bundle).encode() not in (tiny_bundle / file).read_bytes()


@pytest.mark.parametrize("file", GRAPHS)
def test_there_is_no_float64(tiny_bundle: Path, file: str) -> None:
    """WebGPU has none, and WASM is slow with it."""
    model = load(tiny_bundle, file)
    inferred = onnx.shape_inference.infer_shapes(model)
    for graph in all_graphs(inferred.graph):
        for tensor in graph.initializer:
            assert tensor.data_type != TensorProto.DOUBLE, tensor.name
        for value in [*graph.input, *graph.output, *graph.value_info]:
            assert value.type.tensor_type.elem_type != TensorProto.DOUBLE, value.name
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            assert attribute.t.data_type != TensorProto.DOUBLE, node.name
            assert attribute.name not in ("to", "dtype") or attribute.i != TensorProto.DOUBLE


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for one in all_graphs(graph):
        yield from one.node


def test_quantized_matrices_are_computed_with_8_bit_activations(tiny_bundle: Path) -> None:
    """Level 0 is fifty times slower for 8-bit weights."""
    bits = {"vision_encoder": 8, "decoder_model_merged": 4}
    for name, expected in bits.items():
        nodes = list(all_nodes(load(tiny_bundle, f"onnx/{name}_q4.onnx").graph))
        quantized = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert quantized
        for node in quantized:
            found = {one.name: one.i for one in node.attribute}
            assert (found["bits"], found["accuracy_level"]) == (expected, 4)
        assert not any(node.op_type == "MatMul" for node in nodes)


def test_the_tokenizer_has_the_image_token_and_the_template(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    tokenizer = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    placeholder = manifest.prompt.image_placeholder
    assert tokenizer.token_to_id(placeholder) == manifest.prompt.placeholder_token_id
    assert tokenizer.encode(placeholder * 2).ids == [manifest.prompt.placeholder_token_id] * 2
    template = (tiny_bundle / "chat_template.jinja").read_text(encoding="utf-8")
    config = json.loads((tiny_bundle / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == template
    assert config["eos_token"] == "<|endoftext|>"


def test_an_image_token_among_the_ordinary_ones_is_found(tmp_path: Path) -> None:
    """A vocabulary may list it without telling the tokenizer to look for it in texts."""
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    vocabulary["<image>"] = vocabulary.pop("Ġqu", None) or vocabulary.pop("qu")
    raw["model"]["merges"] = [one for one in raw["model"]["merges"] if list(one) != ["q", "u"]]
    write_json(folder / "tokenizer.json", raw)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = before.token_to_id("<image>")
    assert before.encode("<image>").ids != [image]
    bundle = export(folder, tmp_path / "out", precisions="fp32")
    assert bundle.manifest.prompt.placeholder_token_id == image < 113
    with VLM.open(bundle) as vlm:
        caption = vlm.caption(Image.new("RGB", (20, 20)), max_new_tokens=2)
    assert caption.counts["image_tokens"] == 25


def test_a_template_without_the_picture_is_not_exported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmport.families.prefix.family.CHAT_TEMPLATE", "{{ '<picture>' }}")
    with raises(ExportError, "export.prompt-without-image", "1", "0") as e:
        export(tiny_checkpoint, tmp_path / "out", precisions="fp32")
    assert e.value.hint == "does the checkpoint's tokenizer cut '<image>' into pieces?"
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_the_folder_one_is_in_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    monkeypatch.chdir(folder)
    assert export(".", tmp_path / "out", precisions="fp32").manifest.name == "captioner"


def test_what_training_left_in_the_tokenizer_is_taken_off(tmp_path: Path) -> None:
    """Truncation and padding of the training would change prompts."""
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", config | {"auto_map": {"x": "code.py"}})
    export(folder, tmp_path / "out", precisions="fp32")
    saved = json.loads((tmp_path / "out/tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is saved["padding"] is None
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config


def test_auto_names_a_precision_for_each_device(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert set(manifest.auto) == {"cpu", "cuda", "webgpu", "wasm"}
    assert manifest.auto["cpu"]["decoder_model_merged"] == "q4"
    assert manifest.auto["cpu"]["vision_encoder"] == "q8"
    assert manifest.auto["cuda"]["decoder_model_merged"] == "fp32"  # no fp16 was asked for
    assert manifest.auto["wasm"]["decoder_model_merged"] == "q8"
    assert {choice["image_processor"] for choice in manifest.auto.values()} == {"any"}


ALL = ("fp32", "fp16", "q8", "q4", "q4f16")


def test_every_precision_has_its_suffix_and_its_cache(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    bundle = export(tiny_checkpoint, tmp_path / "out", precisions="int8,fp16,q4f16,q4,fp32,q8")
    assert set(bundle.manifest.precisions) == set(ALL)
    suffixes = dict(zip(ALL, ("", "_fp16", "_quantized", "_q4", "_q4f16"), strict=True))
    for precision, suffix in suffixes.items():
        file = f"onnx/decoder_model_merged{suffix}.onnx"
        assert bundle.variant("decoder_model_merged", precision).model == file
        graph = load(bundle.folder, file).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        half = "16" in precision
        cache = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        for name, dtype in types.items():
            if name.startswith(("past_key_values.", "present.")):
                assert dtype == cache, (precision, name)
        assert types["inputs_embeds"] == types["logits"] == TensorProto.FLOAT
    assert bundle.manifest.auto["cuda"]["vision_encoder"] == "fp16"
    tolerance = {name: one.tolerance for name, one in bundle.manifest.golden.expected.items()}
    assert tolerance["fp16"] < 3 * tolerance["fp32"]  # half precision is no quantization
    assert tolerance["q8"] > 10 * tolerance["fp16"]


def test_transformers_js_finds_its_dtypes(tiny_bundle: Path) -> None:
    config = json.loads((tiny_bundle / "config.json").read_text(encoding="utf-8"))
    settings = config["transformers.js_config"]
    assert settings["device_config"]["webgpu"]["dtype"] == {
        "vision_encoder": "q4",
        "embed_tokens": "q4",
        "decoder_model_merged": "q4",
    }
    assert "use_external_data_format" not in settings


def test_the_golden_probe_prefills_64_tokens_or_more(tiny_bundle: Path) -> None:
    golden = Bundle.open(tiny_bundle).manifest.golden
    assert golden.prefill_tokens == golden.copies * 25 == 75
    assert set(golden.expected) == {"fp32", "q8", "q4"}


# The model card


def card(tmp_path: Path, source: str | None) -> str:
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    if source is not None:
        (folder / "README.md").write_text(source, encoding="utf-8")
    export(folder, tmp_path / "out", precisions="fp32", name="org/captioner")
    return (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_the_card_keeps_the_sources_licence_and_base_model(tmp_path: Path) -> None:
    source = (
        "---\nlicense: apache-2.0\nbase_model:\n- org/one\n- org/two\nlanguage: en\n---\n# Hi\n"
    )
    text = card(tmp_path, source)
    front = text.split("---")[1]
    assert "license: apache-2.0" in front
    assert "base_model:\n- org/one\n- org/two" in front
    assert "library_name: transformers.js" in front
    assert "pipeline_tag: image-to-text" in front
    assert "# org/captioner" in text
    assert "ONNX export of an image captioner, written by vlmport" in text
    assert "| `fp32` | float32 throughout" in text
    assert "Not verified yet" in text


@pytest.mark.parametrize(
    "source",
    [None, "# no front matter\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "\ufeff---\n"],
    ids=["none", "bare", "not yaml", "a list", "a mark"],
)
def test_a_card_without_a_licence_claims_none(tmp_path: Path, source: str | None) -> None:
    text = card(tmp_path, source)
    assert "license:" not in text
    assert "base_model:" not in text


def test_a_licence_file_is_copied(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    (folder / "LICENSE").write_text("do what you like\n", encoding="utf-8")
    bundle = export(folder, tmp_path / "out", precisions="fp32")
    assert (tmp_path / "out/LICENSE").read_text(encoding="utf-8") == "do what you like\n"
    assert "LICENSE" in bundle.manifest.files
