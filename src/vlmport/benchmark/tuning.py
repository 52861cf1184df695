"""Find the fastest choices for a bundle on this machine: `vlmport tune`.

Forms, engines and kernels are tried for the vision encoder and the decoder. They change numbers, so
one is only admitted where `vlmport verify` has passed the form, and where its results are no
further from float32 than those of `auto`. An engine has to pass its test first (engines/trust.py).
Of a bundle without results of `vlmport verify`, only the number of threads is tried, which changes
none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmport.benchmark.machine import median
from vlmport.benchmark.picture import gradient
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import HUB
from vlmport.bundle.precisions import precision_name
from vlmport.errors import BundleError, DeviceError
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.engines.trust import trust
from vlmport.runtime.engines.tuned import Tuning, keep_tuning
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import DECODER, VISION, Components, one_by_one
from vlmport.runtime.graphs.devices import (
    HOST,
    PLUGINS,
    Device,
    available_devices,
    engines_name,
)

__all__ = ["Choice", "Report", "tune"]

SECONDS = 120
PROMPT, STEPS = 256, 32  # tokens that a decoder reads, and writes
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
LATEST = 20  # seconds past the time at which rounds end even so
VISION_SHARE = 0.45  # of the time; the rest is the decoder's
GAIN = 0.95  # a choice is taken where it needs at most this share of the time
EXACT = 1e-4  # standard deviations: two kernels that compute the same

Progress = Callable[[str], None]
"""Called with what is measured."""


@dataclass(frozen=True)
class Choice:
    """One way to run a component.

    Attributes:
        seconds: the median of its times; None where it was not measured.
        error: the largest difference from float32, in standard deviations of the result; None
            where the bundle holds no float32 form, or it was not run.
        note: why it was not measured.
    """

    component: str
    form: str
    device: Device = HOST
    older_attention: bool = False
    threads: int | None = None
    seconds: float | None = None
    error: float | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.component} {self.form} on {self.device}"]
        if self.older_attention:
            parts.append("older attention kernel")
        if self.threads is not None:
            parts.append(f"{self.threads} threads")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """What was tried, and what is kept.

    Attributes:
        tuning: the choice that `load` takes from now on, where it is kept.
        tried: every choice, with its time or the reason why it has none. The first of each
            component is `auto`'s.
        verified: whether the bundle holds results of `vlmport verify`; without them, only choices
            that change no number are tried.
        path: the file that keeps it; None where the cache can't be written, or nothing could be
            measured in the time.
    """

    bundle: str
    tuning: Tuning
    tried: tuple[Choice, ...]
    path: Path | None
    verified: bool

    def lines(self) -> list[str]:
        """Format a line for each choice: its time, and the share of the time of `auto`'s."""
        base: dict[str, float] = {}
        lines = []
        for one in self.tried:
            if one.seconds is None:
                lines.append(f"{one!s:<64} {one.note}")
                continue
            first = base.setdefault(one.component, one.seconds)
            lines.append(f"{one!s:<64} {1000 * one.seconds:10.1f} ms  {one.seconds / first:5.2f}")
        return lines


def tune(
    bundle: Bundle | str | Path,
    *,
    seconds: int = SECONDS,
    progress: Progress | None = None,
) -> Report:
    """Measure the choices of this machine for a bundle, and keep the fastest.

    Args:
        bundle: a bundle, or its folder.
        seconds: about how long to measure. A choice that has begun is finished, and each that is
            admitted is measured three times.
        progress: called with what is measured.

    Returns:
        The report. `load` takes its choice from now on, where precision and device are not given.

    Raises:
        BundleError: the bundle is damaged, or of a layout that the runtime does not answer with.
        OptionError: the number of seconds is out of its range.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.needs_layout(HUB)
    seconds = whole_number("seconds", seconds, 1)
    start = time.monotonic()
    tuner = Tuner(opened, start + VISION_SHARE * seconds, progress)
    tried = list(tuner.vision())
    tuner.deadline = start + seconds
    tried += tuner.decoder()
    best = {one.component: one for one in _best(tried).values()}
    threads, measured = tuner.threads(best)
    tuning = _tuning(tuner, best, threads)
    path = keep_tuning(opened.manifest, tuning) if best else None
    return Report(opened.manifest.name, tuning, (*tried, *measured), path, tuner.verified)


def _best(tried: Sequence[Choice]) -> dict[str, Choice]:
    """Map component → the fastest choice, or the first one unless another is clearly faster."""
    best: dict[str, Choice] = {}
    first: dict[str, float] = {}
    for one in tried:
        if one.seconds is None:
            continue
        if one.component not in best:
            best[one.component], first[one.component] = one, one.seconds
            continue
        held = best[one.component].seconds or 0.0
        if one.seconds < held and one.seconds <= GAIN * first[one.component]:
            best[one.component] = one
    return best


def _tuning(tuner: Tuner, best: Mapping[str, Choice], threads: int | None) -> Tuning:
    choice = dict(tuner.auto)
    engines = dict.fromkeys(choice, HOST)
    for name, one in best.items():
        choice[name], engines[name] = one.form, one.device
    older = best[DECODER].older_attention if DECODER in best else False
    return Tuning(precision_name(choice), engines_name(engines), threads, older)


class Tuner:
    """Measures choices for one bundle, up to a time of the monotonic clock."""

    def __init__(self, bundle: Bundle, deadline: float, progress: Progress | None = None):
        self.bundle, self.deadline = bundle, deadline
        self.say: Progress = progress or (lambda what: None)
        self.auto = bundle.manifest.choose("auto")
        rows = (bundle.manifest.parity or {"rows": []})["rows"]
        failed = {row.get("precision") for row in rows if row.get("passed") is not True}
        self.verified = bool(rows)
        self.passed = {row.get("precision") for row in rows} - failed
        host = _open(bundle, self.auto, Choice(VISION, self.auto[VISION]))
        session, made = host.session(VISION), host.process_image(gradient()).inputs
        names = [one.name for one in session.get_inputs()]
        # One tile of an image that is cut into tiles: all of them take the same time each.
        self.image = one_by_one(session, {name: made[name] for name in names})[0]
        host.close()

    def forms(self, component: str) -> list[str]:
        """List auto's form first, then the others that may be tried: verified, and here."""
        forms = self._forms_here(component)
        return [forms[0], *(one for one in forms[1:] if one in self.passed)]

    def _forms_here(self, component: str) -> list[str]:
        auto = self.auto[component]
        others = [one for one in self.bundle.manifest.components[component] if one != auto]
        return [auto, *(one for one in others if self._is_here(component, one))]

    def _left_out(self, component: str) -> Iterator[Choice]:
        """Yield the forms that are not tried because `vlmport verify` has not passed them."""
        for form in self._forms_here(component)[1:]:
            if _is_small(form) and form not in self.passed:
                yield Choice(component, form, note="not tried: `vlmport verify` has not passed it")

    def _is_here(self, component: str, form: str) -> bool:
        """Whether the form's files are on this machine: of a Hub bundle, not all are."""
        variant = self.bundle.variant(component, form)
        return all(self.bundle.path(name).is_file() for name in (variant.model, *variant.data))

    def vision(self) -> Iterator[Choice]:
        """Measure the vision encoder's forms and engines."""
        forms = self.forms(VISION)
        choices = [Choice(VISION, form) for form in forms if form == forms[0] or _is_small(form)]
        for name, plugin in PLUGINS.items():
            if not self.verified or name not in available_devices():
                continue
            places = [
                Device(name, 0, "" if n == 0 else kind) for n, kind in enumerate(plugin.arithmetic)
            ]
            kept = [one for one in plugin.forms if one in forms] or forms[:1]
            choices += [Choice(VISION, kept[0], place) for place in places]
        yield from self._measured(choices, self._encode)
        yield from self._left_out(VISION)

    def decoder(self) -> Iterator[Choice]:
        """Measure the decoder's forms, each with both kernels of attention."""
        forms = self.forms(DECODER)
        choices = [
            Choice(DECODER, form, HOST, older)
            for form in forms
            if form == forms[0] or _is_small(form)
            for older in ((False, True) if self.verified else (False,))
        ]
        yield from self._measured(choices, self._answer)
        yield from self._left_out(DECODER)

    def threads(self, best: Mapping[str, Choice]) -> tuple[int | None, list[Choice]]:
        """Try half the threads for the slowest component; None is one thread a core."""
        half = (os.cpu_count() or 1) // 2
        if half < 1 or not best or self._is_late():
            return None, []
        slowest = max(best.values(), key=lambda one: one.seconds or 0.0)
        runs = {VISION: self._encode, DECODER: self._answer}
        measured = list(
            self._measured(
                [replace(slowest, threads=None), replace(slowest, threads=half)],
                runs[slowest.component],
                judged=False,
            )
        )
        whole, fewer = (one.seconds for one in measured)
        taken = whole is not None and fewer is not None and fewer <= GAIN * whole
        return (half if taken else None), measured[1:]

    def _measured(
        self,
        choices: Sequence[Choice],
        run: Callable[[Components], np.ndarray],
        *,
        judged: bool = True,
    ) -> Iterator[Choice]:
        """Judge each choice, and time those that are admitted in turn."""
        done = self._judged(choices, run) if judged else {one: one for one in choices}
        timed: dict[Choice, list[float]] = {}
        opened: dict[Choice, Components] = {}
        for choice, found in done.items():
            if not found.note:
                self.say(f"opening {choice}")
                opened[choice] = _open(self.bundle, self.auto, choice)
                run(opened[choice])  # the first run is slower, and not counted
                timed[choice] = []
        for number in range(MOST_ROUNDS):
            if self._is_late(0 if number >= LEAST_ROUNDS else LATEST):
                break
            for choice in list(opened)[:: -1 if number % 2 else 1]:
                self.say(f"{choice}, round {number + 1}")
                start = time.perf_counter()
                run(opened[choice])
                timed[choice].append(time.perf_counter() - start)
        for one in opened.values():
            one.close()
        for choice, found in done.items():
            times = timed.get(choice, [])
            if choice in timed and len(times) < LEAST_ROUNDS:
                found = replace(found, note="not measured: the time was over")
                times = []
            yield replace(found, seconds=median(times) if times else None)

    def _judged(
        self, choices: Sequence[Choice], run: Callable[[Components], np.ndarray]
    ) -> dict[Choice, Choice]:
        """Compare each choice with float32; add the reason where it is not admitted."""
        first = choices[0]
        auto = self._result(first, run)
        exact = auto
        if first.form != "fp32" and self._holds(first.component, "fp32"):
            exact = self._result(replace(first, form="fp32"), run)
        allowed = max(_error(auto, exact), EXACT)
        judged = {first: replace(first, error=_error(auto, exact))}
        for choice in choices[1:]:
            if self._is_late():
                judged[choice] = replace(choice, note="not tried: the time was over")
                continue
            self.say(f"testing {choice}")
            try:
                error = _error(self._result(choice, run), exact)
            except (BundleError, DeviceError) as problem:
                judged[choice] = replace(choice, note=f"refused: {problem}"[:200])
                continue
            # A kernel that computes the same form rounds elsewhere: it may be as far off as auto.
            note = "" if error <= 1.25 * allowed else f"refused: {error:.2g} from float32"
            judged[choice] = replace(choice, error=error, note=note)
        return judged

    def _result(self, choice: Choice, run: Callable[[Components], np.ndarray]) -> np.ndarray:
        """Run a choice once, after its engine has passed its test."""
        components = _open(self.bundle, self.auto, choice)
        trust(components)
        result = run(components).copy()
        components.close()
        return result

    def _holds(self, component: str, form: str) -> bool:
        held = form in self.bundle.manifest.components[component]
        return held and self._is_here(component, form)

    def _is_late(self, by: float = 0) -> bool:
        return time.monotonic() > self.deadline + by

    def _encode(self, components: Components) -> np.ndarray:
        return components.encode_image(self.image)

    def _answer(self, components: Components) -> np.ndarray:
        """Read a prompt and write tokens; return the logits of the prompt's last token."""
        dims = components.manifest.dims
        S = max(1, min(PROMPT, dims.context_length - STEPS))
        ids = np.random.default_rng(3).integers(0, dims.vocab_size, (1, S))
        cache = KeyValueCache(components.decoder, 1, S + STEPS, dims.context_length)
        embeds = components.embed(ids)[0]
        logits = cache.prefill(0, embeds)[-1].copy()
        for _ in range(min(STEPS, dims.context_length - S)):
            cache.step(embeds[None, :1])
        return logits


def _open(bundle: Bundle, auto: Mapping[str, str], choice: Choice) -> Components:
    engines: dict[str, Any] = dict.fromkeys(auto, HOST)
    return Components(
        bundle,
        {**auto, choice.component: choice.form},
        {**engines, choice.component: choice.device},
        choice.threads,
        older_attention=choice.older_attention,
    )


def _is_small(form: str) -> bool:
    """Whether a form is worth the time on ONNX Runtime's CPU kernels: floats are never faster."""
    return form not in ("fp32", "fp16")


def _error(result: np.ndarray, exact: np.ndarray) -> float:
    if result.shape != exact.shape or not np.isfinite(result).all():
        return float("inf")
    return float(np.abs(result - exact).max(initial=0.0)) / (float(exact.std()) or 1.0)
