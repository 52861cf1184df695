"""Devices by name, and graphs that can't be opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from tests.errors import raises
from tests.runtime import toy
from vlmport.errors import BundleError, DeviceError, OptionError
from vlmport.runtime.graphs import devices, sessions
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.devices import CPU, Device
from vlmport.runtime.graphs.sessions import open_session


def test_the_cpu_is_always_there():
    assert Device.parse("CPU ") == Device("cpu")
    assert "cpu" in devices.available_devices()


def test_a_device_that_this_onnx_runtime_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    names = ("'cuda:1'", "CUDAExecutionProvider", "CPUExecutionProvider")
    with raises(DeviceError, "device.not-available", *names) as caught:
        Device.parse("cuda:1")
    assert "onnxruntime-gpu" in caught.value.hint
    with raises(DeviceError, "device.not-available", "DmlExecutionProvider"):
        Device.parse("dml")


@pytest.mark.parametrize("name", ["cudda", "tpu", "cuda:x", ""])
def test_an_unknown_device(name: str):
    with raises(DeviceError, "device.unknown") as caught:
        Device.parse(name)
    assert "known: cpu, cuda" in caught.value.hint
    if name == "cudda":
        assert "did you mean 'cuda'" in str(caught.value)


def test_the_index_of_a_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    device = Device.parse("cuda:1")
    assert (device, str(device)) == (Device("cuda", 1), "cuda:1")
    assert sessions._providers(device) == [("CUDAExecutionProvider", {"device_id": "1"}), CPU]


def test_no_silent_fallback_to_the_cpu(bundle, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime warns and takes the CPU when a device's libraries do not load."""

    class Fallen:
        def __init__(self, *args: object, **options: object):
            assert options["enable_fallback"] == 0

        def get_providers(self) -> list[str]:
            return [CPU]

    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with raises(DeviceError, "device.failed", "cuda", "CPUExecutionProvider"):
        open_session(bundle.path("onnx/embed_tokens.onnx"), Device("cuda"))


def test_a_missing_graph(tmp_path: Path):
    with raises(BundleError, "bundle.missing-file"):
        open_session(tmp_path / "absent.onnx")


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_corrupt_graph(bundle, tmp_path: Path, keep: float):
    data = bundle.path("onnx/decoder_model_merged.onnx").read_bytes()
    path = tmp_path / "broken.onnx"
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with raises(BundleError, "graph.not-opened") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def with_external_data(folder: Path) -> Path:
    """A graph whose weight lies in weights.bin."""
    model = toy.model(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        [toy.value("x", onnx.TensorProto.FLOAT, [4096])],
        [toy.value("y", onnx.TensorProto.FLOAT, [4096])],
        {"w": np.ones(4096, "f4")},
    )
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin")
    return path


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_external_data_that_is_not_whole(tmp_path: Path, damage: str):
    path = with_external_data(tmp_path)
    session = open_session(path, threads=1)
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros(4096, "f4")})[0], 1)
    del session
    data = tmp_path / "weights.bin"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with raises(BundleError, "bundle.missing-file"):
        open_session(path)


def test_there_is_one_cpu():
    with raises(DeviceError, "device.unknown", "'cpu:3'") as caught:
        Device.parse("cpu:3")
    assert caught.value.hint == "give 'cpu' alone"


@pytest.mark.parametrize("threads", [0, -1, True, "2", 2.0])
def test_bad_thread_counts(bundle, threads: int):
    with raises(OptionError, "option.wrong-value", "threads=", "1"):
        open_session(bundle.path("onnx/embed_tokens.onnx"), threads=threads)
    # At once, not with the first image.
    with raises(OptionError, "option.wrong-value", f"threads={threads!r}"):
        Components.open(bundle, threads=threads)


def test_a_thread_count_of_numpys(bundle):
    assert type(Components.open(bundle, threads=np.int64(2)).threads) is int
    open_session(bundle.path("onnx/embed_tokens.onnx"), threads=np.int64(2))


def test_numpy_helper_reads_what_the_toy_writes(bundle):
    """The toy's weights are the reference's: else the parity tests would mean nothing."""
    model = onnx.load(bundle.path("onnx/embed_tokens.onnx"))
    stored = numpy_helper.to_array(model.graph.initializer[0])
    np.testing.assert_array_equal(stored, toy.Weights.random()["embed"])
