"""Everything that can be proven, in one go: `make verify-all`, or `python -m tests.verify_all`.

Every model here is exported in every layout of its family at every precision. Then each precision

- runs the golden input that the export recorded (`inspect --probe`), with all hashes checked;
- is compared with fp32 weight by weight, if it is rounded;
- climbs the parity ladder against PyTorch (`verify`), where its rounding can be judged: built-in,
  trained models at all of them, and in the Hub's layout at a mix; models of random weights at fp32
  and fp16. Those fail at few bits by nature, as docs/verification.md says, so there the golden
  input and the weights have to do. Of a trained one the same holds for what training never asked,
  questions without a picture and about three: the table says where they alone were past the limits.

Then come the tests that the suite leaves out, and its property tests with more and new examples
(tests/thorough.py). At the end inputs are damaged at random for some minutes
(`python -m tests.fuzz`). A table says what was run, how long it took and what failed; the exit code
is 1 if anything did.

The random models are of two sizes and differ in all that a checkpoint may differ in: spelling,
stored type, shards, projection, LoRA, a tied head, sizes that no block of 32 divides.

This is no part of `make test`, which runs the same code in the precisions that ship by default, on
fewer models.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.checkpoints import write_prefix_checkpoint
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.builtin import builtin_models
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.bundle.layouts import HUB
from vlmport.checkpoint import Checkpoint
from vlmport.errors import VlmportError
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.families.base import SizedLayout
from vlmport.inspection import probe_bundle
from vlmport.parity import verify
from vlmport.parity.rounding import weight_rows

ROOT = Path(__file__).parents[1]
PRECISIONS = tuple(SUFFIXES)
EXACT_ENOUGH = ("fp32", "fp16")  # for random weights
MIX = "vision=q8,decoder=q4"  # by the names of the Hub's layout
FEW_BITS = ("q4", "q4f16", MIX)
# What the built-in models were never asked, and where few bits then lead them elsewhere.
NEVER_ASKED = frozenset({"text alone", "text of two turns", "three pictures"})
MODELS_WORD = frozenset(
    {"first_logits", "padded_logits", "cached_decode", "greedy_tokens", "end_to_end"}
)


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        trained: whether it ever was.
        image_size: for layouts of pictures of one size; None for their default.
    """

    name: str
    write: Callable[[Path], Path]
    trained: bool = False
    image_size: str | None = None

    def judged(self, layout: str, precisions: Sequence[str]) -> tuple[str, ...]:
        """Those of the precisions, and the mix, whose captions can be held against PyTorch's."""
        if not self.trained:
            return tuple(name for name in precisions if name in EXACT_ENOUGH)
        return (*precisions, MIX) if layout == HUB else tuple(precisions)


def tiny(folder: Path) -> Path:
    """LoRA inside, a linear projection, float32, as transformers 4 spells it."""
    return write_prefix_checkpoint(folder, text={"tie_word_embeddings": False})


def small(folder: Path) -> Path:
    """Wider and deeper: an MLP, bfloat16 in shards, as transformers 5 spells it, a tied head."""
    return write_prefix_checkpoint(
        folder,
        spelling="v5",
        projection="mlp",
        dtype="BF16",
        shards=3,
        seed=1,
        vision={
            "hidden_size": 72,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "intermediate_size": 100,
            "image_size": 84,
            "patch_size": 14,
        },
        text={
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": 160,
            "vocab_size": 271,
        },
        config={"mlp_hidden_dim": 80},
    )


def built_in(name: str) -> Model:
    """168x120 is 35 tokens of a model with tokens of 24 pixels; the others have no such layout."""
    return Model(name, lambda folder: builtin_models()[name], trained=True, image_size="168x120")


# Of the spelling, and of the file of settings, that the other has not.
SMOLVLM: dict[str, Any] = {"model_type": "smolvlm", "spelling": "v5"}

MODELS = (
    *(built_in(name) for name in builtin_models()),
    Model("prefix, tiny", tiny),
    Model("prefix, small", small),
    Model("idefics3, tiny", lambda folder: write_idefics3_checkpoint(folder)),
    Model("smolvlm, tiny", lambda folder: write_idefics3_checkpoint(folder, **SMOLVLM)),
    Model("qwen2.5, tiny", lambda folder: write_qwen2_5(folder), image_size="84x56"),
    Model("qwen3, tiny", lambda folder: write_qwen3(folder), image_size="80x64"),
)


@dataclass(frozen=True)
class Result:
    """A line of the table; `problem` is None where all was right, `note` what to know then."""

    model: str
    layout: str
    precision: str
    check: str
    seconds: float
    problem: str | None
    note: str | None = None


def timed(
    model: str, layout: str, precision: str, check: str, run: Callable[[], str | None]
) -> Result:
    """Run a check; what it raises is its problem, what it returns its note."""
    start, problem, note = time.perf_counter(), None, None
    print(f"{model}, {layout}, {precision}: {check} …", file=sys.stderr, flush=True)
    try:
        note = run()
    except (VlmportError, AssertionError) as error:
        problem = f"{type(error).__name__}: {error}"
    except Exception:  # a defect of ours: the others are run all the same
        problem = traceback.format_exc()
    if problem:
        print(problem, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    return Result(model, layout, precision, check, seconds, problem, note)


def check_model(
    model: Model, folder: Path, precisions: Sequence[str] = PRECISIONS
) -> Iterator[Result]:
    """All layouts of one model at all of these precisions."""
    checkpoint = model.write(folder / "checkpoint")
    for layout, form in family_of(Checkpoint.open(checkpoint)).layouts.items():
        out = folder / layout
        size = model.image_size if isinstance(form, SizedLayout) else None

        def exported(out: Path = out, layout: str = layout, size: str | None = size) -> None:
            export(checkpoint, out, precisions=precisions, layout=layout, image_size=size)
            Bundle.open(out, check_hashes=True)

        done = timed(model.name, layout, "all", "export", exported)
        yield done
        if done.problem is None:
            yield timed(model.name, layout, "all", "probe", lambda out=out: probe(out, precisions))
            yield timed(
                model.name, layout, "all", "weights", lambda out=out: weights(out, precisions)
            )
            for precision in model.judged(layout, precisions):
                check = lambda out=out, one=precision: climb(out, checkpoint, one)  # noqa: E731
                yield timed(model.name, layout, precision, "verify", check)


def probe(out: Path, precisions: Sequence[str]) -> None:
    """The golden input at every precision that was asked for."""
    bundle, said = Bundle.open(out), io.StringIO()
    assert set(bundle.manifest.precisions) == set(precisions), bundle.manifest.precisions
    assert probe_bundle(bundle, "cpu", Console(file=said, width=200)), said.getvalue()


def weights(out: Path, precisions: Sequence[str]) -> None:
    """Each rounded weight beside its fp32 one, whatever the model was trained on."""
    bundle = Bundle.open(out)
    rows = [row for precision in precisions for row in weight_rows(bundle, precision)]
    assert {row.precision for row in rows} == set(precisions) - {"fp32"}
    assert all(row.passed for row in rows), "; ".join(r.describe() for r in rows if not r.passed)


def climb(out: Path, checkpoint: Path, precision: str) -> str | None:
    report = verify(out, checkpoint, precisions=[precision])
    assert {row.precision for row in report.rows} == {precision}
    known = (row.image in NEVER_ASKED and row.rung in MODELS_WORD for row in report.failures)
    if precision in FEW_BITS and report.failures and all(known):
        return f"but for {', '.join(sorted({row.image for row in report.failures}))}"
    assert report.passed, report.summary
    return None


def fuzz(minutes: float) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", str(minutes)]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    assert done.returncode == 0, f"exit {done.returncode}; its findings are printed above"


def rest_of_the_tests() -> None:
    """Run what the suite leaves out: cells of its matrices, and more examples."""
    command = [sys.executable, "-m", "pytest", "--quiet", "--numprocesses", "auto"]
    command += ["--dist", "loadfile", "tests"]
    environment = os.environ | {"VLMPORT_THOROUGH": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
    assert done.returncode == 0, f"exit {done.returncode}; what failed stands above"


def summary(results: list[Result], console: Console) -> None:
    table = Table("model", "layout", "precision", "check", "seconds", "result")
    for one in results:
        passed = f"passed {one.note or ''}".strip()
        verdict = passed if one.problem is None else f"FAILED: {last_line(one.problem)}"
        cells = (one.model, one.layout, one.precision, one.check, f"{one.seconds:.1f}", verdict)
        table.add_row(*cells, style=None if one.problem is None else "red")
    console.print(table)
    failed = sum(one.problem is not None for one in results)
    minutes = sum(one.seconds for one in results) / 60
    console.print(f"{len(results)} checks, {failed} failed, {minutes:.1f} minutes")


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:120]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify_all", description=__doc__)
    parser.add_argument("--fuzz-minutes", type=float, default=4, help="0 leaves it out (4)")
    parser.add_argument("--model", help="one model alone: " + "; ".join(m.name for m in MODELS))
    args = parser.parse_args(arguments)
    chosen = [model for model in MODELS if args.model in (None, model.name)]
    if not chosen:
        parser.error(f"no model {args.model!r}")
    results: list[Result] = []
    for model in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results += check_model(model, Path(folder))
    if args.model is None:
        results.append(timed("-", "-", "-", "rest of the tests", rest_of_the_tests))
    if args.fuzz_minutes:
        results.append(timed("-", "-", "-", "fuzz", lambda: fuzz(args.fuzz_minutes)))
    summary(results, Console(width=None if sys.stdout.isatty() else 160))
    return 1 if any(one.problem for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
