"""The golden probe: a good device passes, each kind of fault is named."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import pytest

from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Bundle, GoldenImage
from vlmport.errors import BundleError
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.layouts.hub import CacheWatch, golden_prompt
from vlmport.runtime.probe import (
    check_golden,
    golden_image,
    logit_ids,
    record_golden,
    run_golden,
)

WEIGHTS = toy.Weights.random()
GOLDEN = toy.golden()


@pytest.fixture(scope="module")
def expected(bundle: Bundle):
    return record_golden(Components.open(bundle, threads=1), GOLDEN)


def test_recording(components: Components, expected):
    embeds = golden_prompt(components, GOLDEN).embeds
    assert len(embeds) == GOLDEN.prefill_tokens == 70
    assert list(expected.tokens) == toy.reference_greedy(WEIGHTS, embeds, 16)
    first = toy.reference_logits(WEIGHTS, embeds)[-1]
    np.testing.assert_allclose(expected.logits, first[list(expected.logit_ids)], atol=2e-3)
    assert expected.tokens[0] in expected.logit_ids
    assert 60 <= len(expected.logit_ids) <= 64
    assert 0 < expected.tolerance < 0.5


def test_the_recorded_manifest_passes(bundle: Bundle, expected):
    golden = dataclasses.replace(GOLDEN, expected={"fp32": expected})
    manifest = dataclasses.replace(bundle.manifest, golden=golden)
    report = check_golden(Components.open(Bundle(bundle.folder, manifest), threads=1))
    assert report.ok
    assert report.logit_error == 0
    assert "fp32 on cpu: as recorded" in str(report)


def test_tokens_go_on_past_stop_tokens(own_bundle, expected):
    bundle = own_bundle(stop=tuple(range(100)))
    assert record_golden(Components.open(bundle, threads=1), GOLDEN).tokens == expected.tokens


def test_logit_ids_cover_the_vocabulary():
    ids = logit_ids(49152, 17)
    assert len(ids) == 64
    assert {0, 17, 49151} <= set(ids.tolist())
    assert np.diff(ids).max() < 900
    assert logit_ids(10, 3).tolist() == list(range(10))


def faulty(bundle: Bundle, **methods) -> Components:
    """Components of which some methods are replaced, as a wrong device would."""
    kind = type("Faulty", (Components,), methods)
    return kind.open(bundle, threads=1)


def wrong_features(self: Components, inputs) -> np.ndarray:
    features = Components.encode_image(self, inputs)
    return features + np.float32(0.2) * features.std()


def test_a_wrong_vision_tower_is_named(bundle: Bundle, expected):
    report = check_golden(faulty(bundle, encode_image=wrong_features), GOLDEN, expected)
    assert not report.ok
    assert "first logits are off by" in str(report)


def break_runs(monkeypatch: pytest.MonkeyPatch, components: Components, damage) -> Components:
    """Call `damage(binding)` in place of the decoder's run."""
    session = components.decoder.session
    run = session.run_with_iobinding
    monkeypatch.setattr(session, "run_with_iobinding", lambda binding: damage(run, binding))
    return components


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[KeyValueCache]:
    """The caches that are made."""
    made: list[KeyValueCache] = []
    init = KeyValueCache.__init__

    def recorded(self: KeyValueCache, *args) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(KeyValueCache, "__init__", recorded)
    return made


def test_a_cache_that_is_not_written_is_named(components, expected, caches, monkeypatch):
    """A device that gives presents in buffers of its own: ours stay as they were."""

    def damage(run, binding) -> None:
        before = [buffer.copy() for buffer in caches[0].buffers]
        run(binding)
        for buffer, old in zip(caches[0].buffers, before, strict=True):
            buffer[...] = old

    report = check_golden(break_runs(monkeypatch, components, damage), GOLDEN, expected)
    assert not report.ok
    assert "the prompt left 'old.0.k', 'old.0.v', … and 2 more unwritten" in report.problems
    assert "step 1" not in str(report)


@pytest.mark.parametrize("where", ["another row", "past the end", "before the token"])
def test_a_write_elsewhere_is_named(components, expected, caches, monkeypatch, where: str):
    calls = 0

    def damage(run, binding) -> None:
        nonlocal calls
        calls += 1
        run(binding)
        row, at = {"another row": (1, 0), "past the end": (0, -1), "before the token": (0, 5)}[
            where
        ]
        if calls == 4:
            caches[0].buffers[2][row, 0, at, 3] += 1

    report = check_golden(break_runs(monkeypatch, components, damage), GOLDEN, expected)
    port = components.decoder.ports[2].past
    assert f"step 3 also changed other positions of {port!r}" in report.problems


def test_a_fault_that_starts_late_is_named(components, expected, monkeypatch):
    """The first logits are right; a cache that rots shows in the tokens."""
    step = KeyValueCache.step

    def rotting(self: KeyValueCache, embeds: np.ndarray) -> np.ndarray:
        return step(self, embeds * np.float32(-1))

    monkeypatch.setattr(KeyValueCache, "step", rotting)
    report = check_golden(components, GOLDEN, expected)
    assert report.logit_error == 0
    assert any(problem.startswith("token ") for problem in report.problems)


def test_a_near_tie_is_no_fault(components, expected):
    """Scores closer than the tolerance may swap on a good device; others may not."""
    run = run_golden(components, GOLDEN)
    best, second = np.argsort(run.logits[3])[::-1][:2]
    swapped = (*expected.tokens[:3], int(second), *expected.tokens[4:])
    margin = float(run.logits[3][best] - run.logits[3][second])
    wide = dataclasses.replace(expected, tokens=swapped, tolerance=margin * 1.01)
    narrow = dataclasses.replace(expected, tokens=swapped, tolerance=margin * 0.99)
    assert check_golden(components, GOLDEN, wide).near_ties == 1
    assert check_golden(components, GOLDEN, wide).ok
    assert f"token 4 of 16 is {best}, recorded was {second}" in str(
        check_golden(components, GOLDEN, narrow)
    )


def test_numbers_that_are_none(bundle: Bundle, expected):
    def undefined(self: Components, inputs) -> np.ndarray:
        return Components.encode_image(self, inputs) * np.float32(np.nan)

    components = faulty(bundle, encode_image=undefined)
    report = check_golden(components, GOLDEN, expected)
    assert "logits are not finite" in str(report)
    with raises(BundleError, "export.invalid-graph", "not finite"):
        record_golden(components, GOLDEN)


def test_another_number_of_image_tokens(components, expected):
    golden = dataclasses.replace(GOLDEN, prefill_tokens=80)
    report = check_golden(components, golden, expected)
    assert "the prompt has 70 tokens, recorded were 80" in report.problems


@pytest.mark.parametrize("ids", [10, 0])
def test_fewer_logits_than_ids(components, expected, ids: int):
    """In a hand-written manifest: what can't be compared has not passed."""
    short = dataclasses.replace(expected, logits=expected.logits[:ids])
    report = check_golden(components, GOLDEN, short)
    assert not report.ok
    assert f"{ids} of {len(expected.logit_ids)} recorded logits can be compared" in str(report)


def test_logits_of_another_vocabulary(components, expected):
    wide = dataclasses.replace(expected, logit_ids=(*expected.logit_ids[:-1], 10**30))
    assert "the vocabulary has 113 entries" in str(check_golden(components, GOLDEN, wide))


def test_a_golden_longer_than_the_context_is_refused_before_it_takes_memory(components, expected):
    golden = dataclasses.replace(GOLDEN, copies=10**11)
    with raises(BundleError, "bundle.wrong-golden", "1400000000000", "200"):
        check_golden(components, golden, expected)
    long = dataclasses.replace(expected, tokens=expected.tokens * 10)
    with raises(BundleError, "bundle.wrong-golden", "229", "200"):
        check_golden(components, GOLDEN, long)


def test_a_short_context_is_probed_as_far_as_it_reaches(own_bundle, expected):
    bundle = own_bundle(context=75)
    assert record_golden(Components.open(bundle, threads=1), GOLDEN).tokens == expected.tokens[:6]


def test_a_precision_without_a_golden(components: Components):
    with raises(BundleError, "bundle.wrong-golden", "'fp32'") as caught:
        check_golden(components)
    assert "probe one of (none)" in caught.value.hint


@pytest.mark.parametrize("rgb", ["AAAA", "not base64!"])
def test_a_damaged_golden_picture(rgb: str):
    golden = dataclasses.replace(GOLDEN, image=GoldenImage(16, 12, rgb))
    with raises(BundleError, "bundle.wrong-golden", "12x16x3"):
        golden_image(golden)


def test_the_golden_picture_is_what_was_stored():
    assert golden_image(GOLDEN).tobytes() == base64.b64decode(GOLDEN.image.rgb)


def test_the_watch_sees_values_that_equal_the_filling(components: Components):
    """Nothing fed, nothing changed; a vector is written when any of its numbers changed."""
    cache = KeyValueCache(components.decoder, 2, 10, 10)
    watch = CacheWatch(cache)
    assert watch.changes(0, 0, "nothing") == []
    for buffer in cache.buffers:
        buffer[1, :, 4:6, 0] = 1
    assert watch.changes(4, 6, "two tokens", row=1) == []
    (fault,) = watch.changes(6, 7, "no token", row=1)
    assert fault.startswith("no token left ")
    assert fault.endswith(" unwritten")
