"""Lazy safetensors: exact values, every damaged file named, nothing loaded before it is asked."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.checkpoints import write_json, write_weights
from tests.errors import assert_error, raises
from vlmport.checkpoint.weights import Weights, open_safetensors
from vlmport.errors import VlmportError, WeightError

TENSORS = {
    "a.weight": np.arange(12, dtype="f4").reshape(3, 4) / 7,
    "b.weight": np.linspace(-2, 2, 5, dtype="f4"),
    "c.bias": np.float32([3.5]),
}


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape: list[int], dtype: str = "F32", end: int = 8) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


def failure(folder: Path) -> WeightError:
    with pytest.raises(WeightError) as caught:
        Weights.open(folder)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_are_read_exactly(tmp_path: Path, dtype: str, shards: int) -> None:
    write_weights(tmp_path, TENSORS, dtype=dtype, shards=shards)
    weights = Weights.open(tmp_path)
    assert set(weights) == set(TENSORS)
    assert len(weights) == 3
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    for name, value in TENSORS.items():
        tensor = weights[name]
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, value.shape, dtype)
        assert tensor.nbytes == value.size * np.dtype(kinds[dtype]).itemsize
        read = tensor.numpy()
        assert read.dtype == np.float32
        assert type(read) is np.ndarray
        assert read.flags.writeable
        np.testing.assert_array_equal(read, value.astype(kinds[dtype]).astype("f4"))


def test_specials_survive_bf16_and_f16(tmp_path: Path) -> None:
    value = np.float32([np.inf, -np.inf, np.nan, -0.0, 2**-24])
    write_weights(tmp_path, {"x": value}, dtype="F16")
    np.testing.assert_array_equal(Weights.open(tmp_path)["x"].numpy(), value)
    every = np.arange(2**16, dtype="u2").view(ml_dtypes.bfloat16)
    save_file({"x": every}, tmp_path / "model.safetensors")
    expected = (np.arange(2**16, dtype="u4") << 16).view("f4")
    np.testing.assert_array_equal(Weights.open(tmp_path)["x"].numpy(), expected)


def test_scalars_empty_and_unaligned_tensors(tmp_path: Path) -> None:
    data = b"\x01" + np.float32([1.5, 2.5]).tobytes() + ml_dtypes.bfloat16(3.0).tobytes()
    entries = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2, 1], "data_offsets": [1, 9]},
        "scalar": {"dtype": "BF16", "shape": [], "data_offsets": [9, 11]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [11, 11]},
        "__metadata__": {"format": "pt"},
    }
    (tmp_path / "model.safetensors").write_bytes(header(entries, data))
    weights = Weights.open(tmp_path)
    assert set(weights) == {"flag", "odd", "scalar", "none"}
    np.testing.assert_array_equal(weights["odd"].numpy(), [[1.5], [2.5]])
    assert weights["scalar"].numpy() == 3.0
    assert weights["none"].numpy().shape == (0, 4)


@pytest.mark.parametrize(
    ("kind", "name"), [("f8", "F64"), ("i8", "I64"), ("i4", "I32"), ("u1", "U8"), ("?", "BOOL")]
)
def test_other_types_are_listed_but_not_read(tmp_path: Path, kind: str, name: str) -> None:
    save_file({"x": np.zeros(4, kind), "y": np.ones(1, "f4")}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    assert weights["y"].numpy() == 1
    with raises(WeightError, "weights.type", "'x'", name, "F32, F16, BF16"):
        weights["x"].numpy()


def test_8_bit_floats_are_refused_since_their_scales_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header(one([8], "F8_E4M3"), bytes(8)))
    with raises(WeightError, "weights.type", "'a'", "F8_E4M3") as caught:
        Weights.open(tmp_path)["a"].numpy()
    assert "quantized" in (caught.value.hint or "")


def test_nothing_is_loaded_until_asked_and_then_one_tensor(tmp_path: Path) -> None:
    size = 1 << 20
    big = {f"t{i}": np.full(size, i, "f4") for i in range(8)}
    write_weights(tmp_path, big)
    tracemalloc.start()
    weights = Weights.open(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < size
    for name in weights:
        weights[name].numpy()
    assert tracemalloc.get_traced_memory()[1] < 1.1 * 4 * size
    tracemalloc.stop()


def test_no_file_stays_open_and_a_lost_one_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    weights = Weights.open(tmp_path)
    held = Path("/proc/self/fd")
    if held.exists():
        assert str(file) not in [str(fd.readlink()) for fd in held.iterdir() if fd.is_symlink()]
    file.write_bytes(file.read_bytes()[:-3])
    with raises(WeightError, "weights.unreadable", file, " 4 bytes", 0):
        [tensor.numpy() for tensor in weights.values()]
    file.unlink()
    with raises(WeightError, "weights.unreadable", "'a.weight'", "No such file"):
        weights["a.weight"].numpy()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "0 bytes"),
        (b"\x01\x02", "header too small"),
        (header(one([2]), bytes(7)), "file not fully covered"),
        (header(one([2]), bytes(9)), "not fully covered"),
        (header(one([2]), bytes(8), length=10**15), "header too large"),
        (header(one([2]), bytes(8), length=2**64 - 1), "header too large"),
        (header(one([3]), bytes(8)), "invalid shape"),
        (header(one([2**60, 2**60]), bytes(8)), "overflow"),
        (header(b'{"a":' * 10_000), "recursion limit"),
        (header(b"[]"), "invalid type: sequence"),
        (header(b'{"a": NaN}'), "expected value"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><title>404</title>", "web page"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes, expected: str) -> None:
    """The safetensors library's reason stays in the message."""
    (tmp_path / "model.safetensors").write_bytes(data)
    error = failure(tmp_path)
    foreign = {"Git LFS": "source.lfs-pointer", "web page": "source.web-page"}
    code = foreign.get(expected, "weights.unreadable")
    assert_error(error, code, tmp_path / "model.safetensors", expected)
    assert "download" in (error.hint or "")


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert failure(tmp_path).code == "source.not-a-file"


def test_a_link_into_a_cache_that_lost_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("blobs/0")
    assert_error(failure(tmp_path), "source.missing-file", tmp_path / "model.safetensors")


@pytest.mark.parametrize("shape", [[0, 2**62], [2**40, 0, 2**40], [0] * 70])
def test_an_empty_tensor_of_an_impossible_shape(tmp_path: Path, shape: list[int]) -> None:
    (tmp_path / "model.safetensors").write_bytes(header(one(shape, end=0)))
    try:
        tensor = Weights.open(tmp_path)["a"]
    except WeightError:
        return
    with raises(WeightError, "weights.unreadable", "'a'", shape if len(shape) < 9 else "[0, 0"):
        tensor.numpy()


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, shards=3)
    for shard in (1, 3):
        (tmp_path / f"model-0000{shard}-of-00003.safetensors").unlink()
    facts = ("2 of 3", "'model-00001-of-00003.safetensors', 'model-00003-of-00003.safetensors'")
    assert_error(failure(tmp_path), "weights.missing-file", *facts)


def test_the_index_and_the_shards_must_agree(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    del content["weight_map"]["c.bias"]
    write_json(index, content)
    text = str(failure(tmp_path))
    assert "not where the index says: 'lost.weight in model-00001-of-00002.safetensors'" in text
    assert "not in the index: 'c.bias in model-00001-of-00002.safetensors'" in text


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"b.weight": TENSORS["b.weight"], "a.weight": TENSORS["b.weight"]}, second)
    assert "not in the index: 'a.weight in model-00002" in str(failure(tmp_path))


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", ".safetensors", "x.bin", "", 3, None, ["x"], "a\0.safetensors"],
)  # fmt: skip
def test_the_index_names_files_beside_it_only(tmp_path: Path, file: object) -> None:
    index = {"weight_map": {"a": file, "b": "model-00001-of-00001.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert_error(failure(tmp_path), "weights.bad-index", "index.json")


def test_an_index_with_a_whole_document_for_a_name_is_refused_in_few_words(tmp_path: Path) -> None:
    """Found by fuzzing: the message had all of it."""
    nested = {
        f"layers.{number}.weight": "model-00001-of-00001.safetensors" for number in range(999)
    }
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": nested}})
    )
    said = str(failure(tmp_path))
    assert "\"{'layers.0.weight'" in said
    assert len(said) < 500


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "model.safetensors.index.json", content)
    assert_error(failure(tmp_path), "weights.bad-index", "index.json", "weight_map")


def test_an_index_that_is_not_json_is_a_weight_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert_error(failure(tmp_path), "source.not-json", "index.json", "line 1")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_pickled_weights_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    error = failure(tmp_path)
    assert_error(error, "weights.pickled", f"'{name}'", "model.safetensors")
    assert "safe_serialization=True" in (error.hint or "")


def test_no_weights_says_what_there_is(tmp_path: Path) -> None:
    assert_error(failure(tmp_path), "weights.missing-file", tmp_path, "model.safetensors")
    (tmp_path / "other.gguf").write_bytes(b"x")
    assert_error(failure(tmp_path), "weights.missing-file", tmp_path, "'other.gguf'")


def read_all(folder: Path, data: bytes) -> None:
    """Whatever the bytes are, reading them works or raises our own error."""
    file = folder / "fuzzed.safetensors"
    file.write_bytes(data)
    try:
        tensors = open_safetensors(file)
    except VlmportError as error:
        if not error.hint or file.name not in str(error):
            raise
        return
    for tensor in tensors.values():
        if tensor.dtype in ("F32", "F16", "BF16"):
            assert tensor.numpy().shape == tensor.shape


@settings(deadline=None)
@given(st.binary(max_size=64) | st.binary(max_size=64).map(header))
def test_random_bytes_raise_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    read_all(tmp_path_factory.getbasetemp(), data)


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "F4", "X", "f32", 3]),
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**32, 2**63, 2**64, 0.5])),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "é"]), ENTRY | st.none()),
    st.binary(max_size=40),
    st.integers(-3, 3),
)
def test_random_headers_raise_our_error(
    tmp_path_factory: pytest.TempPathFactory, entries: dict, data: bytes, shift: int
) -> None:
    text = json.dumps(entries).encode()
    folder = tmp_path_factory.getbasetemp()
    read_all(folder, header(text, data, length=max(0, len(text) + shift)))


WHOLE = header({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(WHOLE)),
)
def test_a_mutated_file_raises_our_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    folder = tmp_path_factory.getbasetemp()
    read_all(folder, bytes(data))
    read_all(folder, bytes(data[:length]))
