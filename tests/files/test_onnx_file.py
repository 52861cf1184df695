"""One ONNX file is read without its weights, whole or not at all; what is missing is named."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.errors import raises
from vlmport import cli
from vlmport.errors import BundleError
from vlmport.files.onnx_file import read_model, read_onnx


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        cli.app, ["inspect", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"}
    )


def small_model(weights: int = 1000) -> onnx.ModelProto:
    """An If whose branches hold a weight each, behind a large weight and a contrib operator."""

    def branch(name: str) -> onnx.GraphProto:
        one = numpy_helper.from_array(np.ones(4, np.float16), f"{name}_w")
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT16, [4])
        node = helper.make_node("Identity", [f"{name}_w"], [f"{name}_out"])
        return helper.make_graph([node], name, [], [out], [one])

    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
        helper.make_node("Mul", ["x", "w"], ["m"]),
        helper.make_node("Gelu", ["m"], ["z"], domain="com.microsoft"),
    ]
    inputs = [
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, weights]),
        helper.make_tensor_sequence_value_info("s", TensorProto.INT64, None),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT16, [4]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, None),
    ]
    weight = numpy_helper.from_array(np.arange(weights, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="me")
    helper.set_model_props(model, {"note": "by hand"})
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(small_model(), path)
    return path


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "big.onnx"
    onnx.save(
        small_model(), path, save_as_external_data=True, location="big.onnx_data", size_threshold=64
    )
    assert (tmp_path / "big.onnx_data").stat().st_size == 4000
    return path


def test_all_that_a_graph_says(file: Path) -> None:
    graph = read_onnx(file)
    assert graph.opsets == {"ai.onnx": 21, "com.microsoft": 1}
    assert (graph.ir_version, graph.producer) == (10, "me")
    assert [str(one) for one in graph.inputs] == [
        "flag bool[]",
        "x float[batch, ?, 1000]",
        "s sequence of int64 of any shape",
    ]
    assert [str(one) for one in graph.outputs] == ["y float16[4]", "z float of any shape"]
    assert graph.operators == {
        "ai.onnx": Counter({"Identity": 2, "If": 1, "Mul": 1}),
        "com.microsoft": Counter({"Gelu": 1}),
    }
    assert graph.weights == {"float": (1, 4000), "float16": (2, 16)}
    assert graph.metadata == {"note": "by hand"}
    assert graph.external == ()


def test_weights_are_stepped_over_and_nothing_else(file: Path) -> None:
    """What is left is the model that onnx loads, less the bytes of its weights."""
    whole, skimmed = onnx.load(file), read_model(file)
    assert skimmed.ByteSize() < 1000 < whole.ByteSize()
    for one in (whole.graph.initializer[0], skimmed.graph.initializer[0]):
        one.ClearField("raw_data")
    assert skimmed == whole


@pytest.mark.parametrize("bits", [4, 2])
def test_packed_weights_count_their_bits(tmp_path: Path, bits: int) -> None:
    model = small_model()
    kind = {4: TensorProto.INT4, 2: TensorProto.UINT2}[bits]
    model.graph.initializer[0].CopyFrom(
        TensorProto(name="w", dims=[7, 3], data_type=kind, raw_data=bytes(11))
    )
    onnx.save(model, tmp_path / "m.onnx")
    name = TensorProto.DataType.Name(kind).lower()
    assert read_onnx(tmp_path / "m.onnx").weights[name] == (1, -(-21 * bits // 8))


def test_weights_that_stand_among_the_inputs_are_none(tmp_path: Path) -> None:
    """IR 3 demanded them there."""
    model = small_model()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [1000]))
    onnx.save(model, tmp_path / "m.onnx")
    assert [one.name for one in read_onnx(tmp_path / "m.onnx").inputs] == ["flag", "x", "s"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs sparse files")
def test_a_gigabyte_of_weights_is_not_read(tmp_path: Path) -> None:
    """A file whose weights are a hole of 1.5 GB; this process has no room for it."""
    model, size = small_model(), 1_500_000_000
    model.graph.initializer[0].raw_data = b""
    model.graph.initializer[0].dims[:] = [size // 4]
    graph = model.graph.SerializeToString()
    tensor = model.graph.initializer[0].SerializeToString()
    at = graph.index(tensor) - 1
    assert graph[at] == len(tensor) < 128

    def varint(value: int) -> bytes:
        out = b""
        while value >= 128:
            out, value = out + bytes([value % 128 + 128]), value // 128
        return out + bytes([value])

    raw = b"\x4a" + varint(size)  # raw_data, field 9
    model.ClearField("graph")
    bytes_of = b"\x3a"  # graph, field 7
    # raw_data with no bytes was written too, as two bytes at the tensor's end
    old = tensor.removesuffix(b"\x4a\x00")
    head = graph[:at] + varint(len(old) + len(raw) + size) + old + raw
    rest = graph[at + 1 + len(tensor) :]
    path = tmp_path / "hole.onnx"
    with path.open("wb") as out:
        out.write(model.SerializeToString() + bytes_of + varint(len(head) + size + len(rest)))
        out.write(head)
        out.seek(size, os.SEEK_CUR)
        out.write(rest)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + 200_000_000, hard))
    try:
        assert read_onnx(path).weights["float"] == (1, size)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """Private memory of this process so far."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc here")
    line = next(one for one in status.read_text().splitlines() if one.startswith("VmData:"))
    return int(line.split()[1]) * 1024


# Bad files


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for end in (0, 1, 2, 5, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(BundleError, match=r"not a complete ONNX graph|empty \(0 bytes\)"):
            read_onnx(file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not a graph at all, but text\n" * 4, "not a complete ONNX graph"),
        (b"\x08\x0a", "no graph, no opset"),
        (b"\xff" * 200, "its bytes are not protobuf"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "not a complete ONNX graph"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    done = run(path)
    assert done.exit_code == 2
    assert why in done.stderr
    assert "hint: " in done.stderr


# External data


def test_external_files_are_named_with_their_sizes(external: Path) -> None:
    graph = read_onnx(external)
    assert graph.weights["float"] == (1, 4000)
    assert graph.total_size == external.stat().st_size + 4000
    done = run(external)
    assert done.exit_code == 0
    assert "big.onnx_data: 0.00 MB" in done.stdout


@pytest.mark.parametrize(
    ("length", "why"), [(None, "missing"), (3999, "3999 bytes, the graph needs 4000")]
)
def test_weights_that_are_not_all_there(external: Path, length: int | None, why: str) -> None:
    """What can be said is said first."""
    data = external.with_name("big.onnx_data")
    if length is None:
        data.unlink()
    else:
        os.truncate(data, length)
    done = run(external)
    assert done.exit_code == 2
    assert "in  x float[batch, ?, 1000]" in done.stdout
    assert f"its weights are incomplete: big.onnx_data: {why}" in done.stderr


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", ""])
def test_weights_outside_of_the_folder(external: Path, name: str) -> None:
    model = onnx.load(external, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = name
    external.write_bytes(model.SerializeToString())
    done = run(external)
    assert done.exit_code == 2
    assert "outside of the graph's folder" in done.stderr


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_names_that_no_file_system_takes(external: Path, name: str) -> None:
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = name
    external.write_bytes(model.SerializeToString())
    with raises(BundleError, "bundle.missing-file"):
        read_onnx(external).check()


# On the command line


def test_one_graph_of_a_bundle(tiny_bundle: Path) -> None:
    done = run(tiny_bundle / "onnx/decoder_model_merged_q4.onnx")
    assert done.exit_code == 0
    for text in (
        "opsets           ai.onnx 23, com.microsoft 1",
        "in  inputs_embeds float[batch_size, sequence_length, 32]",
        "GroupQueryAttention 2",
        "written by       vlmport ",
    ):
        assert text in done.stdout, text


def test_a_folder_that_is_no_bundle_lists_its_graphs(file: Path, external: Path) -> None:
    done = run(file.parent)
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["big.onnx", "model.onnx"]
    assert "flag, x, s → y, z" in done.stdout
    assert "not a vlmport bundle (no vlmport.json); 2 ONNX files" in done.stderr
    assert f"next: vlmport inspect {external}" in done.stderr
    external.with_name("big.onnx_data").unlink()
    file.write_bytes(b"")
    done = run(file.parent)
    assert done.exit_code == 2
    assert done.stderr.count("error[bundle.missing-file]: ") == 1
    assert done.stderr.count("error[bundle.unreadable]: ") == 1


def test_the_graphs_folder_of_a_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tiny_bundle / "onnx")
    assert done.exit_code == 0
    assert f"{tiny_bundle / 'onnx'}: part of {tiny_bundle}; 10 ONNX files" in done.stderr
    monkeypatch.chdir(tiny_bundle / "onnx")
    assert f".: part of {tiny_bundle}; 10 ONNX files" in run(".").stderr


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "no such file or folder" in run(tmp_path / "none").stderr
    (tmp_path / "notes.txt").write_text("x")
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "neither a vlmport bundle (no vlmport.json) nor a folder with ONNX files" in done.stderr
    assert "'notes.txt'" in done.stderr


def test_a_single_graph_cannot_be_probed(file: Path) -> None:
    done = run(file, "--probe")
    assert done.exit_code == 2
    assert "error[bundle.no-manifest]" in done.stderr
    assert "--probe" in done.stderr
    assert "no vlmport.json" in done.stderr
