"""Fuzz for some minutes with new seeds: `python -m tests.fuzz --minutes 5`.

Each round is a process of its own, so that what kills or hangs it (in C, where no alarm is heard)
is a finding too. A failure prints the input that Hypothesis has made small, and the command that
repeats the round.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import COMMAND_LINE, TARGETS, Target
from tests.fuzz.workshop import Workshop

ROOT = Path(__file__).parents[2]
ROUND = 1200  # seconds after which a round hangs, on a machine that others use too
EXAMPLES = {
    "command line": 100,
    "picture": 400,
    "decoding options": 1500,
    "model.safetensors": 200,
    "model.safetensors.index.json": 200,
    "valid vlmport.json": 100,
    "valid vlmport.json, components": 100,
    "valid vlmport.json, fused": 100,
    "valid vlmport.json, genai": 100,
    "ONNX file": 400,
    "bundle's chat_template.jinja": 100,
}
FEW = 40
ALL = (COMMAND_LINE, *TARGETS)


def fuzz(target: Target, number: int, examples: int) -> None:
    """One round in this process. Raises what the target raises on the smallest input found."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        target.run(shop, data.draw(target.inputs(shop)))

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shop = Workshop(Path(folder))
        run()


def round_in_a_process(target: Target, number: int) -> str | None:
    """What went wrong, or None."""
    examples = EXAMPLES.get(target.name, FEW)
    options = ["--target", target.name, "--seed", str(number), "--examples", str(examples)]
    command = [sys.executable, "-m", "tests.fuzz", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ROUND, cwd=ROOT)
    except subprocess.TimeoutExpired:
        problem = f"no end after {ROUND} s"
    else:
        if not done.returncode:
            return None
        problem = f"exit {done.returncode}\n{done.stderr[-6000:]}"
    repeat = f"python -m tests.fuzz --target '{target.name}' --seed {number} --examples {examples}"
    return f"{target.name}: {problem}\nagain: {repeat}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long to go on (5)")
    parser.add_argument("--target", help="one target alone: " + ", ".join(t.name for t in ALL))
    parser.add_argument("--seed", type=int, help="repeat one round in this process")
    parser.add_argument("--examples", type=int, default=FEW)
    args = parser.parse_args()
    chosen = [target for target in ALL if args.target in (None, target.name)]
    if not chosen:
        parser.error(f"no target {args.target!r}")
    if args.seed is not None:
        for target in chosen:
            fuzz(target, args.seed, args.examples)
        return 0
    return loop(chosen, args.minutes)


def loop(targets: list[Target], minutes: float) -> int:
    """Rounds in turn until the time is over, each target at least once."""
    end, first = time.monotonic() + 60 * minutes, random.SystemRandom().randrange(2**31)
    print(f"fuzzing {len(targets)} targets for {minutes:g} minutes from seed {first}", flush=True)
    failures: dict[str, str] = {}
    rounds = 0
    for number, target in zip(itertools.count(first), itertools.cycle(targets), strict=False):
        if time.monotonic() > end and rounds >= len(targets):
            break
        rounds += 1
        if target.name in failures:
            continue
        if problem := round_in_a_process(target, number):
            failures[target.name] = problem
            print(f"\n{problem}\n", flush=True)
        if len(failures) == len(targets):
            break
    print(f"fuzz: {rounds} rounds, {len(failures)} of {len(targets)} targets failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
