"""`vlmport tune`: what is admitted, what is chosen, and that `load` takes it and says so."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import vlmport
from tests.errors import raises
from vlmport import cli
from vlmport.benchmark import tuning
from vlmport.benchmark.tuning import Choice, Tuner, tune
from vlmport.bundle import Bundle
from vlmport.errors import DeviceError, OptionError
from vlmport.runtime.engines import tuned
from vlmport.runtime.engines.tuned import Tuning, find_tuning, keep_tuning, record_of
from vlmport.runtime.graphs import sessions
from vlmport.runtime.graphs.components import DECODER, VISION, Components
from vlmport.runtime.graphs.devices import Device

OLDER = Tuning("vision=fp32,decoder=q8", "cpu", 1, True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and no engine but the CPU."""
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "available_devices", lambda: ["cpu"])
    return tmp_path / "cache/tuned"


@pytest.fixture
def captioner(tiny_bundle: Path) -> Bundle:
    """A bundle, all of whose precisions have passed `vlmport verify`."""
    bundle = Bundle.open(tiny_bundle)
    forms = bundle.manifest.components[DECODER]
    return with_parity(bundle, dict.fromkeys(forms, True))


def with_parity(bundle: Bundle, passed: Mapping[str, bool]) -> Bundle:
    """Give a bundle results of verify: two rungs for each precision, the second always right."""
    rows = [
        {"precision": name, "passed": one}
        for name, first in passed.items()
        for one in (first, True)
    ]
    parity = {"reference": "x", "passed": all(passed.values()), "rows": rows}
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, parity=parity))


def paced(seconds: Callable[[Components], float]) -> Callable[[Any, Components], np.ndarray]:
    """In the place of a run: takes this time, and gives the same result in all forms."""

    def run(self: Any, components: Components) -> np.ndarray:
        time.sleep(seconds(components))
        return np.arange(4, dtype=np.float32)

    return run


def test_it_measures_what_the_bundle_holds(captioner: Bundle) -> None:
    report = tune(captioner, seconds=1)
    auto = captioner.manifest.choose("auto")
    first = {one.component: one for one in reversed(report.tried)}
    assert (first[VISION].form, first[DECODER].form) == (auto[VISION], auto[DECODER])
    assert all(one.seconds is not None or one.note for one in report.tried)
    assert report.path == record_of(captioner.manifest)
    assert find_tuning(captioner.manifest) == report.tuning
    assert len(report.lines()) == len(report.tried)


def test_the_fastest_is_chosen(captioner: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Tuner, "_encode", paced(lambda one: 0.001 if one.choice[VISION] == "q4" else 0.02)
    )
    monkeypatch.setattr(Tuner, "_answer", paced(lambda one: 0.02 - 0.015 * one.older_attention))
    found = tune(captioner, seconds=60).tuning
    assert Components.open(captioner, precision=found.precision).choice[VISION] == "q4"
    assert found.older_attention
    assert found.device == "cpu"


def test_auto_stays_where_nothing_is_clearly_faster(captioner: Bundle, monkeypatch) -> None:
    same = paced(lambda one: 0.02)
    monkeypatch.setattr(Tuner, "_encode", same)
    monkeypatch.setattr(Tuner, "_answer", same)
    monkeypatch.setattr(tuning, "GAIN", 0.7)  # the machine of the tests is busy
    found = tune(captioner, seconds=60).tuning
    assert found.precision == tuning.precision_name(captioner.manifest.choose("auto"))
    assert (found.threads, found.older_attention) == (None, False)


def test_a_form_further_from_float32_than_auto_is_refused(captioner: Bundle, monkeypatch) -> None:
    """However fast it is."""
    errors = {"fp32": 0.0, captioner.manifest.choose("auto")[VISION]: 0.01}

    def encode(self: Any, components: Components) -> np.ndarray:
        return np.arange(4) * (1 + errors.get(components.choice[VISION], 0.5))

    tuner = Tuner(captioner, time.monotonic() + 60)
    monkeypatch.setattr(Tuner, "_encode", encode)
    tried = list(tuner.vision())
    assert tried[0].seconds is not None
    assert tried[0].error == pytest.approx(0.027, abs=0.01)
    refused = [one for one in tried[1:] if one.seconds is None]
    assert refused == tried[1:]
    assert all("from float32" in one.note for one in refused)


@pytest.mark.parametrize("passed", [{"q8": True, "q4": False}, {"q8": True}])
def test_a_form_that_verify_has_not_passed_is_not_tried(
    captioner: Bundle, passed: Mapping[str, bool]
) -> None:
    """Neither one that failed, nor one that was not verified."""
    assert "q4" in Tuner(captioner, time.monotonic() + 60).forms(VISION)
    tuner = Tuner(with_parity(captioner, passed), time.monotonic() + 60)
    assert "q4" not in tuner.forms(VISION)
    (left_out,) = [one for one in tuner.vision() if one.form == "q4"]
    assert left_out.seconds is None
    assert "has not passed" in left_out.note
    other = with_parity(captioner, {"q4": True, "fp32": True})
    assert tuner.auto[DECODER] == "q4"
    (left_out,) = [one for one in Tuner(other, 0).decoder() if one.form == "q8"]
    assert "has not passed" in left_out.note


def test_without_results_of_verify_no_number_changes(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast other forms, kernels and engines are."""
    slow = paced(lambda one: 0.02 if one.threads is None else 0.001)
    monkeypatch.setattr(Tuner, "_encode", slow)
    monkeypatch.setattr(Tuner, "_answer", slow)
    monkeypatch.setattr(tuning, "available_devices", lambda: ["cpu", "openvino"])
    bundle = Bundle.open(tiny_bundle)
    report = tune(with_parity(bundle, {}), seconds=60)
    auto = bundle.manifest.choose("auto")
    measured = [one for one in report.tried if one.seconds is not None]
    assert {(one.component, one.form) for one in measured} == {
        (name, auto[name]) for name in (VISION, DECODER)
    }
    assert not any(one.older_attention or one.device != Device("cpu") for one in measured)
    assert report.tuning == Tuning(
        tuning.precision_name(auto), "cpu", (os.cpu_count() or 1) // 2 or None
    )
    assert not report.verified


def test_an_engine_that_fails_its_test_is_a_note(captioner: Bundle, monkeypatch) -> None:
    def refuse(components: Components) -> None:
        if any(device.name != "cpu" for device in components.engines.values()):
            raise DeviceError("image 1 is off", hint="", code="device.wrong-numbers")

    monkeypatch.setattr(tuning, "trust", refuse)
    monkeypatch.setattr(tuning, "available_devices", lambda: ["cpu", "openvino"])
    tried = list(Tuner(captioner, time.monotonic() + 60).vision())
    notes = {str(one.device): one.note for one in tried if one.device != Device("cpu")}
    assert set(notes) == {"openvino", "openvino:bf16", "openvino:f16"}
    assert all("image 1 is off" in note for note in notes.values())


def test_no_time_left(captioner: Bundle) -> None:
    tried = list(Tuner(captioner, time.monotonic() - 1).decoder())
    assert tried[0].seconds is not None
    assert all("time" in one.note for one in tried[1:])
    tried = list(Tuner(captioner, time.monotonic() - 100).decoder())
    assert [one.seconds for one in tried] == [None] * len(tried)
    with raises(OptionError, "option.wrong-value", "seconds"):
        tune(captioner, seconds=0)


@pytest.mark.parametrize("change", ["machine", "version", "plugin", "bundle"])
def test_a_choice_holds_for_this_machine_and_bundle(
    captioner: Bundle, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = captioner.manifest
    keep_tuning(manifest, OLDER)
    assert find_tuning(manifest) == OLDER
    if change == "machine":
        monkeypatch.setattr(tuned, "machine_key", lambda: {"cpu": "another"})
    elif change == "version":
        monkeypatch.setattr(tuned.ort, "__version__", "9.9.9")
    elif change == "plugin":
        monkeypatch.setattr(tuned, "PLUGINS", {})
    else:
        manifest = dataclasses.replace(manifest, files=dict(list(manifest.files.items())[1:]))
    assert find_tuning(manifest) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({**vars(OLDER), "threads": 0}),
        json.dumps({**vars(OLDER), "precision": "q9"}),
        json.dumps({**vars(OLDER), "device": "abacus"}),
        json.dumps({**vars(OLDER), "older_attention": 1}),
    ],
)
def test_a_choice_that_can_not_be_used_is_none(captioner: Bundle, text: str) -> None:
    path = keep_tuning(captioner.manifest, OLDER)
    assert path is not None
    path.write_text(text)
    assert find_tuning(captioner.manifest) is None


def test_load_takes_the_choice(captioner: Bundle) -> None:
    plain = vlmport.load(captioner.folder)
    assert plain.tuning is None
    keep_tuning(captioner.manifest, OLDER)
    model = vlmport.load(captioner.folder)
    assert model.tuning == OLDER
    assert model.components.choice[VISION] == "fp32"
    assert model.components.choice[DECODER] == "q8"
    assert (model.components.threads, model.components.older_attention) == (1, True)
    assert "tuned" in repr(model)
    for options in (
        {"tune": False},
        {"precision": "q8"},
        {"device": "cpu"},
        {"threads": 1},
    ):
        assert vlmport.load(captioner.folder, **options).tuning is None


def test_a_command_says_that_it_is_tuned(captioner: Bundle, picture: Path) -> None:
    keep_tuning(captioner.manifest, OLDER)
    arguments = ["caption", str(picture), "-m", str(captioner.folder), "--max-new-tokens", "2"]
    said = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert "tuned: precision vision=fp32,decoder=q8, device cpu, 1 threads" in said.stderr
    said = CliRunner().invoke(cli.app, [*arguments, "--no-tune"], catch_exceptions=False)
    assert "tuned" not in said.stderr


def test_the_command(captioner: Bundle) -> None:
    arguments = ["tune", str(captioner.folder), "--seconds", "1"]
    said = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert said.exit_code == 0
    assert "chosen: precision " in said.stdout
    assert "no results of `vlmport verify`" in said.stderr
    assert find_tuning(captioner.manifest) is not None


def test_nothing_is_kept_where_nothing_was_measured(captioner: Bundle, monkeypatch) -> None:
    monkeypatch.setattr(tuning.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(Tuner, "_is_late", lambda self, by=0: True)
    assert tune(captioner, seconds=1).path is None
    arguments = ["tune", str(captioner.folder), "--seconds", "1"]
    said = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert "--seconds" in said.stderr
    assert "chosen" not in said.stdout
    assert find_tuning(captioner.manifest) is None


def test_the_older_kernel_is_chosen_for_one_session_only(captioner: Bundle, monkeypatch) -> None:
    seen: list[str | None] = []
    inner = sessions.ort.InferenceSession

    def opened(*args: Any, **options: Any) -> Any:
        seen.append(os.environ.get(sessions.NO_FLASH))
        return inner(*args, **options)

    monkeypatch.delenv(sessions.NO_FLASH, raising=False)
    monkeypatch.setattr(sessions.ort, "InferenceSession", opened)
    old = Components.open(captioner, precision="fp32", threads=1, older_attention=True)
    new = Components.open(captioner, precision="fp32", threads=1)
    embeds = new.embed(np.arange(40)[None])
    mask, positions = np.ones((1, 40), np.int64), np.arange(40)[None]
    got, want = (one.decode(embeds, mask, positions)[0] for one in (old, new))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert seen == [None, "1", None]
    assert sessions.NO_FLASH not in os.environ


def test_no_other_session_opens_while_one_opens_with_the_older_kernel(
    captioner: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order: ONNX Runtime reads the variable of the process when a session opens."""
    seen: list[tuple[str, str | None]] = []
    begun = {kernel: threading.Event() for kernel in ("older", "newer")}
    inner = sessions.ort.InferenceSession

    def opened(*args: Any, **options: Any) -> Any:
        name = threading.current_thread().name
        begun[name].set()
        begun["older" if name == "newer" else "newer"].wait(0.3)  # lets the other one begin too
        seen.append((name, os.environ.get(sessions.NO_FLASH)))
        return inner(*args, **options)

    monkeypatch.delenv(sessions.NO_FLASH, raising=False)
    monkeypatch.setattr(sessions.ort, "InferenceSession", opened)
    path = captioner.path("onnx/embed_tokens.onnx")
    for first, second in (("older", "newer"), ("newer", "older")):
        threads = [
            threading.Thread(
                target=sessions.open_session,
                args=(path,),
                kwargs={"threads": 1, "older_attention": name == "older"},
                name=name,
            )
            for name in (first, second)
        ]
        threads[0].start()
        assert begun[first].wait(20)
        threads[1].start()
        for thread in threads:
            thread.join(20)
        for event in begun.values():
            event.clear()
    assert sorted(seen) == [("newer", None)] * 2 + [("older", "1")] * 2
    assert sessions.NO_FLASH not in os.environ


def test_a_choice_as_text() -> None:
    assert str(OLDER).endswith("1 threads, older attention kernel")
    choice = Choice(VISION, "fp32", Device("openvino", 0, "bf16"), threads=2)
    assert str(choice) == "vision_encoder fp32 on openvino:bf16, 2 threads"
