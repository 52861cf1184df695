"""Engines: how they are named, and that a wrong one is never trusted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.errors import raises
from tests.runtime import toy
from vlmport import cli
from vlmport.bundle import Bundle, write_manifest
from vlmport.errors import DeviceError
from vlmport.inspection import probe_bundle
from vlmport.runtime.engines import probing, trust
from vlmport.runtime.engines.tolerance import coarseness, tolerance_of
from vlmport.runtime.graphs import base, devices
from vlmport.runtime.graphs.components import DECODER, EMBED, VISION, Components
from vlmport.runtime.graphs.devices import HOST, Device, choose_forms, parse_engines
from vlmport.runtime.graphs.sessions import ORT_ERRORS, open_session
from vlmport.runtime.model import VLM
from vlmport.runtime.probe import record_golden

FAKE = Device("cuda")  # never opened: the tests put a session of the CPU in its place
NAMES = ("image_processor", VISION, EMBED, DECODER)
needs_openvino = pytest.mark.skipif(
    find_spec("onnxruntime_ep_openvino") is None, reason="onnxruntime-ep-openvino is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own. Returns the folder of verdicts."""
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/engines"


@pytest.fixture
def plugin_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's plugin is found, whether it is installed or not."""
    monkeypatch.setattr(devices, "find_spec", lambda name: object())


# Names


@pytest.mark.usefixtures("plugin_is_here")
def test_one_device_is_for_all_components_that_may_choose() -> None:
    engines = parse_engines("openvino:bf16", NAMES)
    assert {name: str(one) for name, one in engines.items()} == {
        "image_processor": "cpu",
        VISION: "openvino:bf16",
        EMBED: "openvino:bf16",
        DECODER: "openvino:bf16",
    }
    assert devices.engines_name(engines) == "openvino:bf16"
    assert devices.engines_name(parse_engines("cpu", NAMES)) == "cpu"


@pytest.mark.usefixtures("plugin_is_here")
def test_components_that_a_mix_does_not_name_run_on_the_cpu() -> None:
    engines = parse_engines(" vision = openvino:f32 , decoder=cpu", NAMES)
    assert engines == {**dict.fromkeys(NAMES, HOST), VISION: Device("openvino")}
    name = "vision_encoder=openvino,embed_tokens=cpu,decoder_model_merged=cpu"
    assert devices.engines_name(engines) == name
    assert parse_engines(name, NAMES) == engines


@pytest.mark.usefixtures("plugin_is_here")
def test_components_that_can_not_choose() -> None:
    with raises(DeviceError, "device.wrong-component", "image_processor", "CPU") as caught:
        parse_engines("image_processor=openvino", NAMES)
    assert VISION in caught.value.hint
    assert parse_engines("image_processor=cpu", NAMES) == dict.fromkeys(NAMES, HOST)
    with raises(DeviceError, "device.wrong-component", "'visoin'", "'vision'"):
        parse_engines("visoin=openvino", NAMES)
    with raises(DeviceError, "device.unknown", "'abacus'"):
        parse_engines("vision=abacus", NAMES)
    for mix in ("vision=cpu,vision=openvino", "vision=openvino,vision_encoder=openvino"):
        with raises(DeviceError, "device.wrong-component", mix, f"{VISION} is named twice"):
            parse_engines(mix, NAMES)


@pytest.mark.usefixtures("plugin_is_here")
@pytest.mark.parametrize("text", ["openvino:bf17", "openvino:1", "cpu:bf16"])
def test_arithmetic_that_a_device_does_not_have(text: str) -> None:
    with raises(DeviceError, "device.unknown", text.partition(":")[2]) as caught:
        Device.parse(text)
    assert ("openvino:bf16" in caught.value.hint) == text.startswith("openvino")


def test_a_plugin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with raises(DeviceError, "device.not-available", "onnxruntime-ep-openvino") as caught:
        Device.parse("openvino")
    assert "pip install onnxruntime-ep-openvino" in caught.value.hint
    assert "openvino" not in devices.available_devices()


@pytest.mark.usefixtures("plugin_is_here")
def test_auto_gives_openvino_no_dynamic_8_bit_file(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    engines = parse_engines("vision=openvino", manifest.components)
    assert manifest.choose("auto")[VISION] == "q8"
    chosen = choose_forms(manifest, "auto", engines)
    assert chosen == {**manifest.choose("auto"), VISION: "fp32"}
    named = choose_forms(manifest, "vision=q8", engines)
    assert named[VISION] == "q8"  # as the user says; the probe judges it


# The probe, in this process: each kind of fault is found in the component that has it


class Faulty:
    """A session of the CPU that damages what it gives."""

    def __init__(self, session: Any, damage: Callable[[int, list[np.ndarray]], list[np.ndarray]]):
        self._session, self._damage, self.calls = session, damage, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Any, feeds: Any) -> list[np.ndarray]:
        self.calls += 1
        return self._damage(self.calls, self._session.run(names, feeds))

    def run_with_iobinding(self, binding: Any) -> None:
        self.calls += 1
        if self._damage(self.calls, []) is not None:
            self._session.run_with_iobinding(binding)


def probe_with(
    bundle: Bundle, component: str, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> probing.Verdict:
    def opened(path: Path, device: Device, **options: Any) -> Any:
        session = open_session(path, HOST, **options)
        return session if device == HOST else Faulty(session, damage)

    host = Components.open(bundle, threads=1)
    inputs = probing.make_inputs(host)
    monkeypatch.setattr(base, "open_session", opened)
    return probing.probe_component(bundle, host.choice, component, FAKE, inputs, 1)


def nothing(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
    return results


def wrong(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
    return [one + np.float32(0.5) * one.std() for one in results]


def nan(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
    return [np.where(np.arange(one.shape[-1]) == 2, np.nan, one) for one in results]


def empty(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
    return [np.zeros((0, *one.shape[1:]), np.float32) for one in results]


def wrong_at_first(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
    return wrong(call, results) if call == 1 else results


def fails(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
    raise ORT_ERRORS[0]("Non-zero status code returned")


@pytest.mark.parametrize("component", [VISION, EMBED, DECODER])
def test_an_engine_that_computes_as_the_cpu_is_trusted(bundle, component, monkeypatch) -> None:
    verdict = probe_with(bundle, component, monkeypatch, nothing)
    assert verdict.problem is None
    assert verdict.error == 0.0
    assert (verdict.component, verdict.form, verdict.tolerance) == (component, "fp32", 0.01)


@pytest.mark.parametrize("component", [VISION, EMBED])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong, "0.5 standard deviations"),
        (nan, "not finite"),
        (empty, "shape (0,"),
        (wrong_at_first, "differs from run to run"),
        (fails, "Non-zero status code"),
    ],
)
def test_each_fault_is_found(bundle, component, damage, said, monkeypatch) -> None:
    verdict = probe_with(bundle, component, monkeypatch, damage)
    assert verdict.problem is not None
    assert said in verdict.problem


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_proves_nothing(value: float) -> None:
    """NaN is neither above nor below a tolerance."""
    expected, result = np.array([1.0, value], "f4"), np.array([1.0, 2.0], "f4")
    for other in (expected, result):
        _, problem = probing.compare([("a step", expected)], [("a step", other)], 0.01)
        assert problem == "a step: 1 of 2 values of the CPU are not finite"
    huge = np.array([3e38, -3e38], "f4")  # their spread is no float32
    with np.errstate(all="ignore"):
        _, problem = probing.compare([("a step", huge)], [("a step", -huge)], 0.01)
    assert problem is not None


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_decoder_that_does_not_write_is_found_at_each_call(bundle, at, monkeypatch) -> None:
    """The prompt, tokens after a cache, a step, a step of two rows."""
    calls: list[int] = []

    def damage(call: int, results: list[np.ndarray]) -> list[np.ndarray] | None:
        calls.append(call)
        return None if call == at else results

    verdict = probe_with(bundle, DECODER, monkeypatch, damage)
    assert verdict.problem is not None
    assert max(calls) >= 4


def test_a_second_size_is_tried(bundle, monkeypatch) -> None:
    """An engine that is right for the golden image's size only."""
    shapes: set[tuple[int, ...]] = set()

    def damage(call: int, results: list[np.ndarray]) -> list[np.ndarray]:
        shapes.add(results[0].shape)
        return wrong(call, results) if results[0].size != 12 * toy.HIDDEN else results

    verdict = probe_with(bundle, VISION, monkeypatch, damage)
    assert verdict.problem is not None
    assert verdict.problem.startswith("image 2 ")
    assert len(shapes) == 2


def test_tolerances() -> None:
    plain, coarse = Device("openvino"), Device("openvino", 0, "bf16")
    assert tolerance_of("fp32", plain) == tolerance_of("any", plain) == 0.01
    assert tolerance_of("fp32", coarse) == 0.25
    assert tolerance_of("q8", plain) == tolerance_of("q8", coarse) == 0.3
    assert (coarseness("fp32", plain), coarseness("fp32", coarse)) == (1, 25)


# Trust: the process, its end, and what is kept


@pytest.fixture
def plugged(bundle: Bundle) -> Components:
    """The toy with its vision encoder on an engine."""
    whole = Components.open(bundle, threads=1)
    return Components(bundle, whole.choice, {**whole.engines, VISION: FAKE}, 1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy with recorded results."""
    bundle = toy.write_bundle(tmp_path_factory.mktemp("recorded"))
    golden = bundle.manifest.golden
    expected = {"fp32": record_golden(Components.open(bundle, threads=1), golden)}
    golden = dataclasses.replace(golden, expected=expected)
    write_manifest(bundle.folder, dataclasses.replace(bundle.manifest, golden=golden))
    return Bundle.open(bundle.folder)


def child(monkeypatch: pytest.MonkeyPatch, program: str) -> list[int]:
    """Run this in the place of the probe. Returns a list that grows with each start."""
    starts: list[int] = []

    def command() -> list[str]:
        starts.append(1)
        text = "import json, os, sys, time\nrequest = json.load(sys.stdin)\n"
        text += "def say(**one): print(json.dumps(one), flush=True)\n"
        return [sys.executable, "-c", text + program]

    monkeypatch.setattr(trust, "_command", command)
    return starts


GOOD = """
for one in request["components"]:
    say(begins=one)
    say(component=one, engine="x", problem=None)
say(done=True)
"""


def test_a_verdict_is_kept(plugged: Components, monkeypatch, cache: Path) -> None:
    starts = child(monkeypatch, GOOD)
    trust.trust(plugged)
    trust.trust(plugged)
    assert len(starts) == 1
    assert [path.name.startswith(VISION) for path in cache.iterdir()] == [True]


@pytest.mark.parametrize("change", ["machine", "version", "file", "threads", "environment"])
def test_a_kept_verdict_holds_for_what_was_tried(
    plugged: Components, change: str, monkeypatch, tmp_path: Path
) -> None:
    starts = child(monkeypatch, GOOD)
    trust.trust(plugged)
    if change == "machine":
        monkeypatch.setattr(trust, "machine_key", lambda: {"cpu": "another"})
    elif change == "version":
        monkeypatch.setattr(trust.ort, "__version__", "9.9.9")
    elif change == "file":
        folder = Path(shutil.copytree(plugged.bundle.folder, tmp_path / "copy"))
        os.utime(folder / "onnx/vision_encoder.onnx", (1, 1))
        bundle = dataclasses.replace(plugged.bundle, folder=folder)
        plugged = Components(bundle, plugged.choice, plugged.engines, 1)
    elif change == "threads":
        plugged.threads = 2
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    trust.trust(plugged)
    assert len(starts) == 2


def test_components_that_passed_apart_are_tested_together(
    recorded: Bundle, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    name = probing.WHOLE
    whole = f'say(begins="{name}")\nsay(component="{name}", engine="x", problem=None)\n'
    starts = child(monkeypatch, GOOD.replace("say(done", f"{whole}say(done"))
    opened = Components.open(recorded, precision="fp32", threads=1)

    def mix(*names: str) -> Components:
        engines = {**opened.engines, **dict.fromkeys(names, FAKE)}
        return Components(recorded, opened.choice, engines, 1)

    mixes = [(VISION,), (EMBED,), (VISION, EMBED)]
    for started, names in zip([1, 2, 3, 3, 3, 3], [*mixes, *mixes], strict=True):
        trust.trust(mix(*names))
        assert len(starts) == started
    assert len(list(cache.iterdir())) == 2 + 3
    bad = whole.replace("None", '"the golden answer differs"')
    child(monkeypatch, f"assert not request['components']\n{bad}say(done=True)")
    for path in cache.glob(f"{probing.WHOLE}-*"):
        path.unlink()
    with raises(DeviceError, "device.wrong-numbers", "the golden answer differs") as caught:
        trust.trust(mix(VISION, EMBED))
    assert caught.value.hint == "--device cpu"


def test_a_damaged_verdict_is_no_verdict(plugged: Components, monkeypatch, cache: Path) -> None:
    starts = child(monkeypatch, GOOD)
    trust.trust(plugged)
    for text in ("", "[]", "{}", '{"problem": "wrong"}'):
        next(cache.iterdir()).write_text(text)
        trust.trust(plugged)
    assert len(starts) == 5


def test_a_wrong_engine_is_refused_each_time(plugged: Components, monkeypatch, cache: Path) -> None:
    said = 'say(begins=request["components"][0])\n'
    said += f'say(component="{VISION}", engine="cuda", problem="image 1 is off")\nsay(done=True)'
    starts = child(monkeypatch, said)
    for _ in range(2):
        with raises(DeviceError, "device.wrong-numbers", VISION, "cuda", "image 1 is off"):
            trust.trust(plugged)
    assert len(starts) == 2
    assert not cache.exists()


def test_the_hint_leaves_the_other_components_there(bundle: Bundle, monkeypatch) -> None:
    whole = Components.open(bundle, threads=1)
    engines = {**whole.engines, VISION: FAKE, EMBED: FAKE}
    child(monkeypatch, GOOD.replace("problem=None", f'problem="off" if one == "{EMBED}" else None'))
    with raises(DeviceError, "device.wrong-numbers", EMBED) as caught:
        trust.trust(Components(bundle, whole.choice, engines, 1))
    assert VISION not in str(caught.value)
    assert caught.value.hint == "--device vision_encoder=cuda"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_crash_is_the_fault_of_the_component_that_ran(plugged: Components, monkeypatch) -> None:
    child(monkeypatch, f'say(begins="{VISION}")\nos.kill(os.getpid(), 11)')
    with raises(DeviceError, "device.wrong-numbers", VISION, "cuda", "crashed (SIGSEGV)"):
        trust.trust(plugged)


def test_a_probe_that_hangs(plugged: Components, monkeypatch) -> None:
    monkeypatch.setattr(trust, "SECONDS", 1)
    child(monkeypatch, f'say(begins="{VISION}")\ntime.sleep(60)')
    with raises(DeviceError, "device.wrong-numbers", VISION, "1 seconds"):
        trust.trust(plugged)


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "say(begins=5); print('{')", ""])
def test_a_process_that_says_nothing_is_no_trust(plugged, program, monkeypatch) -> None:
    child(monkeypatch, program)
    with pytest.raises(DeviceError) as caught:
        trust.trust(plugged)
    assert caught.value.code in ("device.probe-failed", "device.wrong-numbers")


def test_a_frozen_program_can_not_start_a_probe(plugged: Components, monkeypatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with raises(DeviceError, "device.probe-failed", "cuda"):
        trust.trust(plugged)


def test_the_cpu_needs_no_probe(bundle: Bundle, monkeypatch) -> None:
    starts = child(monkeypatch, "")
    VLM.open(bundle, threads=1)
    assert not starts


# OpenVINO's plugin itself


@needs_openvino
@pytest.mark.parametrize("device", ["vision=openvino", "vision=openvino:bf16,embed=openvino"])
def test_openvino_runs_the_tower(built_in, device: str, picture: Path, cache: Path) -> None:
    bundle = built_in("shapes")
    with VLM.open(bundle, precision="fp32", device=device, threads=1) as model:
        assert model.engines[VISION] == device.split(",")[0].removeprefix("vision=")
        assert model.engines["image_processor"] == "cpu"
        assert f"vision_encoder={model.engines[VISION]}" in repr(model)
        caption = str(model.caption(picture))
    with VLM.open(bundle, precision="fp32", threads=1) as model:
        assert str(model.caption(picture)) == caption
    whole = "fp32" in bundle.manifest.golden.expected
    assert len(list(cache.iterdir())) == device.count("openvino") + whole


@needs_openvino
def test_openvino_is_refused_a_decoder_by_name(built_in) -> None:
    """Its steps are wrong where past and present are one buffer."""
    with raises(DeviceError, "device.wrong-numbers", DECODER, "openvino") as caught:
        VLM.open(built_in("shapes"), precision="fp32", device="openvino", threads=1)
    assert VISION not in str(caught.value)
    assert "vision_encoder=openvino" in caught.value.hint


@needs_openvino
def test_inspect_names_what_an_engine_computes_wrongly(recorded: Bundle) -> None:
    import io

    from rich.console import Console

    said = io.StringIO()
    assert not probe_bundle(recorded, "openvino", Console(file=said, width=200))
    lines = said.getvalue().splitlines()
    assert any(f"{VISION} on openvino: as on the CPU" in line for line in lines)
    assert any(DECODER in line and "as on the CPU" not in line for line in lines)


@needs_openvino
def test_what_the_engine_prints_is_no_answer(recorded: Bundle) -> None:
    whole = Components.open(recorded, device="vision=openvino", threads=1)
    verdicts = trust.run_probe(whole, [VISION])
    assert [one["component"] for one in verdicts] == [VISION, probing.WHOLE]
    assert all(json.dumps(one) for one in verdicts)


@needs_openvino
def test_bench_measures_on_engines(tiny_bundle: Path) -> None:
    arguments = ["bench", str(tiny_bundle), "-p", "fp32", "--tokens", "4", "--rounds", "1"]
    arguments += ["--new-tokens", "2", "--device", "vision=openvino"]
    said = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.stderr
    engines = "vision_encoder=openvino,embed_tokens=cpu,decoder_model_merged=cpu"
    assert f"fp32 on {engines}" in said.stdout
    measured = json.loads(said.stdout.splitlines()[-1])
    assert measured["settings"]["engines"] == {"fp32": engines}
    assert measured["figures"]["fp32"]["cold_s"] > 0
