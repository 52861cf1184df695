"""Devices by name, and the engine that each component of a bundle runs on.

An engine is a provider of ONNX Runtime on a device: its own CPU kernels, a provider of the
installed build (CUDA, CoreML, …), or a plugin, which is a package of its own that the stock build
loads. A device is written `cpu`, `cuda:1` or, with the arithmetic of its products,
`openvino:bf16`. A mix names components: `vision=openvino:bf16,decoder=cpu`.

Traps:
- `image_processor` and `position_ids` always run on ONNX Runtime's CPU kernels: they compute with
  64-bit integers, which some engines narrow to 32 bits without an error.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import onnxruntime as ort

from vlmport.bundle import Manifest
from vlmport.bundle.precisions import SHORT_NAMES, choose, precision_name
from vlmport.errors import DeviceError, did_you_mean, quoted

CPU = "CPUExecutionProvider"
IMAGE, POSITIONS = "image_processor", "position_ids"
ALWAYS_ON_CPU = (IMAGE, POSITIONS)

# Device → (its provider in ONNX Runtime, the package that brings it).
PROVIDERS = {
    "cpu": (CPU, "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime (on macOS)"),
    "directml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "webgpu": ("WebGpuExecutionProvider", "onnxruntime-webgpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-ep-openvino"),
    "migraphx": ("MIGraphXExecutionProvider", "onnxruntime-migraphx"),
    "qnn": ("QNNExecutionProvider", "onnxruntime-qnn"),
}
INDEXED = ("cuda", "tensorrt", "directml", "migraphx")  # devices of which there may be several
ALIASES = {"auto": "cpu", "dml": "directml", "gpu": "cuda", "trt": "tensorrt"}


@dataclass(frozen=True)
class Plugin:
    """A provider that is a package of its own, loaded into the stock ONNX Runtime.

    Attributes:
        package: its name for pip.
        module: the Python module that knows the path of its library.
        selects: the metadata of the hardware to run on, among those that it offers.
        arithmetic: the types that it may compute products in; the first is the default.
        forms: the precisions that `auto` prefers for it, where a bundle names none.
    """

    package: str
    module: str
    selects: Mapping[str, str]
    arithmetic: tuple[str, ...]
    forms: tuple[str, ...]

    def version(self) -> str:
        """Return its version, or '' where it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""


# OpenVINO computes dynamic 8-bit products (q8) in float32, so `auto` takes the float file for it.
# Its own default is bf16 where the CPU has it; here the user asks for that.
PLUGINS = {
    "openvino": Plugin(
        "onnxruntime-ep-openvino",
        "onnxruntime_ep_openvino",
        {"ov_device": "CPU"},
        ("f32", "bf16", "f16"),
        ("fp32", "fp16"),
    )
}
_registered: set[str] = set()
_registering = threading.Lock()


@dataclass(frozen=True)
class Device:
    """A device by vlmport's name, with its index (`cuda:1`) or arithmetic (`openvino:bf16`)."""

    name: str
    index: int = 0
    arithmetic: str = ""  # empty for a device's only one

    @classmethod
    def parse(cls, text: str) -> Device:
        """Parse 'cpu', 'cuda', 'cuda:1', 'openvino:bf16', …

        Raises DeviceError for an unknown name or one that this ONNX Runtime does not offer.
        """
        name, _, detail = text.strip().lower().partition(":")
        name = ALIASES.get(name, name)
        takes_index = name in INDEXED
        if name not in PROVIDERS or (takes_index and detail and not detail.isdecimal()):
            raise DeviceError(
                f"device {quoted(text)} is unknown{did_you_mean(name, PROVIDERS)}",
                hint=f"known: {', '.join(PROVIDERS)}; here: {', '.join(available_devices())}",
                code="device.unknown",
            )
        arithmetic = PLUGINS[name].arithmetic if name in PLUGINS else ()
        if detail and not takes_index and detail not in arithmetic:
            others = "".join(f", or {name}:{one}" for one in arithmetic)
            raise DeviceError(
                f"device {quoted(text)}: {name} has no {quoted(detail)}",
                hint=f"give {name!r} alone{others}",
                code="device.unknown",
            )
        _check_available(text, name)
        if arithmetic:
            return cls(name, 0, detail if detail != arithmetic[0] else "")
        return cls(name, int(detail or 0))

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for it."""
        return PROVIDERS[self.name][0]

    @property
    def plugin(self) -> Plugin | None:
        """The plugin that brings it; None for a device of ONNX Runtime's own build."""
        return PLUGINS.get(self.name)

    @property
    def is_processor(self) -> bool:
        """Whether it computes on the CPU, in the host's memory."""
        return self.provider == CPU or self.plugin is not None

    def __str__(self) -> str:
        detail = self.arithmetic or (str(self.index) if self.index else "")
        return f"{self.name}:{detail}" if detail else self.name


HOST = Device("cpu")
Engines = Mapping[str, Device]
"""Component → the device that it runs on."""


def available_devices() -> list[str]:
    """The devices that can be used here, by vlmport's names."""
    return [name for name in PROVIDERS if _is_available(name)]


def _is_available(name: str) -> bool:
    if name in PLUGINS:
        return find_spec(PLUGINS[name].module) is not None
    return PROVIDERS[name][0] in ort.get_available_providers()


def _check_available(text: str, name: str) -> None:
    if _is_available(name):
        return
    provider, package = PROVIDERS[name]
    if name in PLUGINS:
        raise DeviceError(
            f"device {quoted(text)} needs the package {package}, which is not installed",
            hint=f"pip install {package}, next to the ONNX Runtime that is installed",
            code="device.not-available",
        )
    raise DeviceError(
        f"device {quoted(text)} needs {provider}; this ONNX Runtime {ort.__version__} has "
        f"{', '.join(ort.get_available_providers())}",
        hint=f"pip install {package}, instead of the ONNX Runtime that is installed",
        code="device.not-available",
    )


def parse_engines(text: str, components: Iterable[str]) -> dict[str, Device]:
    """Map component → device for 'cpu', 'openvino', or a mix such as 'vision=openvino:bf16'.

    In a mix, components that are not named run on the CPU.

    Raises DeviceError for an unknown device, a component that the bundle lacks or that is named
    twice, or one that always runs on the CPU.
    """
    components = list(components)
    if "=" not in text:
        device = Device.parse(text)
        return {one: HOST if one in ALWAYS_ON_CPU else device for one in components}
    engines: dict[str, Device] = {}
    for part in text.split(","):
        name, _, device = (piece.strip() for piece in part.partition("="))
        name = SHORT_NAMES.get(name, name)
        free = [one for one in components if one not in ALWAYS_ON_CPU]
        place = Device.parse(device)
        if name in ALWAYS_ON_CPU and place != HOST:
            raise DeviceError(
                f"device {quoted(text)}: {name} always runs on the CPU",
                hint=f"name others: {', '.join(free)}",
                code="device.wrong-component",
            )
        if name not in components:
            raise DeviceError(
                f"device {quoted(text)}: no component {quoted(name)}"
                f"{did_you_mean(name, [*SHORT_NAMES, *components])}",
                hint=f"components of this bundle: {', '.join(free)}",
                code="device.wrong-component",
            )
        if name in engines:
            raise DeviceError(
                f"device {quoted(text)}: {name} is named twice",
                hint="give each component one device",
                code="device.wrong-component",
            )
        engines[name] = place
    return dict.fromkeys(components, HOST) | engines


def choose_forms(manifest: Manifest, precision: str, engines: Engines) -> dict[str, str]:
    """Map component → precision, where 'auto' means what suits the component's engine.

    Raises BundleError for a precision that the bundle does not hold.
    """
    auto = dict(manifest.auto)
    for name, plugin in PLUGINS.items():
        if name not in auto:
            auto[name] = {
                component: next((one for one in plugin.forms if one in forms), form)
                for component, form in auto["cpu"].items()
                for forms in (manifest.components.get(component, {}),)
            }
    names = {device.name for device in engines.values()}
    chosen = {name: choose(manifest.components, auto, precision, name) for name in names}
    return {component: chosen[device.name][component] for component, device in engines.items()}


def engines_name(engines: Engines) -> str:
    """Name the engines: one name where all components that may choose share it, else a mix."""
    return precision_name(
        {name: str(one) for name, one in engines.items() if name not in ALWAYS_ON_CPU}
    )


def add_plugin(options: ort.SessionOptions, device: Device, threads: int | None) -> None:
    """Let a session run on a plugin's device.

    The plugin has a thread pool of its own. ONNX Runtime's threads must not spin next to it.

    Raises DeviceError where the plugin's library does not load, or offers no such hardware.
    """
    plugin = device.plugin
    assert plugin is not None
    try:
        found = _plugin_devices(device)
    except Exception as error:  # its library, or one that it needs, does not load
        raise DeviceError(
            f"device {device}: {plugin.package} does not load: {error}".split("\n")[0],
            hint="check its version against that of ONNX Runtime, or use --device cpu",
            code="device.failed",
        ) from error
    if not found:
        raise DeviceError(
            f"device {device}: {plugin.package} offers no hardware of this kind here",
            hint="use --device cpu",
            code="device.not-available",
        )
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings = {"INFERENCE_PRECISION_HINT": device.arithmetic or plugin.arithmetic[0]}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    options.add_provider_for_devices(found[:1], {"load_config": json.dumps({"CPU": settings})})


def _plugin_devices(device: Device) -> list[Any]:
    """Return the hardware that a plugin offers and vlmport uses; load the plugin once."""
    plugin = device.plugin
    assert plugin is not None
    with _registering:
        if device.name not in _registered:
            path = importlib.import_module(plugin.module).get_library_path()
            ort.register_execution_provider_library(device.name, path)
            _registered.add(device.name)
    return [
        one
        for one in ort.get_ep_devices()
        if one.ep_name == device.provider and plugin.selects.items() <= one.ep_metadata.items()
    ]
