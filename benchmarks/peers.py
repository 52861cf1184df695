"""A model in vlmport beside other engines: encode, prefill, decode, and a whole request.

    python benchmarks/peers.py [--model captioner|smolvlm] [--rounds N] [--threads N] [--small]
        [--only NAME,NAME] [--tokenizer FOLDER]

All engines have the same weights (random, at the real size), the same pixels, ids and number of
threads. Each lives in a process of its own that sleeps while another is asked; the figures are
taken in turn, one engine after the other, and medians are compared. The logits after a prompt are
compared with torch's float32 first, so that no engine is fast at something else. An engine that is
not installed, or that fails, is named with its reason. Prints a table, then one line of JSON.

For the peers: pip install onnxruntime-genai openvino nncf gguf llama-cpp-python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import captioner
import numpy as np
import smolvlm

from vlmport.benchmark.machine import describe_machine, interleaved, median

MODELS = {"captioner": captioner.write_model, "smolvlm": smolvlm.write_model}
ENGINES = (
    "vlmport fp32", "vlmport q8", "vlmport q4", "vlmport auto",
    "torch fp32", "torch bf16",
    "genai int4",
    "openvino bf16", "openvino int8", "openvino int4",
    "llama.cpp q4_0", "llama.cpp q8_0",
)  # fmt: skip
PACKAGES = (
    "vlmport", "onnxruntime", "torch", "transformers", "onnxruntime-genai", "openvino", "nncf",
    "gguf", "llama-cpp-python",
)  # fmt: skip
PRECISIONS = "fp32,q8,q4"  # that vlmport exports


class Worker:
    """An engine in a process: one line of JSON asks, one answers."""

    def __init__(self, name: str, folder: Path, threads: int, tokens: int):
        """Raises RuntimeError where its model can't be converted."""
        self.name = name
        self.log = (folder / f"{name.replace(' ', '-')}.log").open("w+", encoding="utf-8")
        program = Path(__file__).parent / "engines.py"
        command = [sys.executable, str(program), name, str(folder), str(threads), str(tokens)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "0"}
        prepared = subprocess.run(
            [*command, "--prepare"], stdout=self.log, stderr=self.log, env=environment, check=False
        )
        if prepared.returncode:
            raise RuntimeError(self._said(prepared.returncode))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def ask(self, what: str) -> Any:
        """The answer. Raises RuntimeError where the process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("answer "):  # some libraries print to stdout
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(self._said(self.process.wait()))

    def _said(self, code: int) -> str:
        """How it ended (below 0: by that signal), and what it last wrote."""
        self.log.seek(0)
        written = [line.strip() for line in self.log if line.strip()]
        said = f"; it last wrote: {written[-1][:200]}" if written else ""
        return f"ended with {code}{said}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def open_engines(
    names: list[str], folder: Path, threads: int, tokens: int
) -> tuple[dict[str, tuple[Worker, list[str]]], dict[str, str]]:
    """Engine → (its process, its figures), one after the other; and why others did not come up."""
    opened: dict[str, tuple[Worker, list[str]]] = {}
    failed: dict[str, str] = {}
    for name in names:
        worker = None
        try:
            worker = Worker(name, folder, threads, tokens)
            figures = worker.ask("figures")
            worker.ask(next(one for one in figures if "prefill" in one))  # some fall over at work
            opened[name] = worker, figures
            print(f"{name}: ready", file=sys.stderr)
        except RuntimeError as error:
            failed[name] = str(error)
            if worker is not None:
                worker.stop()
            print(f"{name}: {error}", file=sys.stderr)
    return opened, failed


def check_logits(workers: dict[str, Worker], what: str) -> dict[str, float]:
    """Engine → cosine of its logits after a prompt with torch's in float32 (vlmport's, without).

    Args:
        what: 'text', or 'request' with its pictures.
    """
    logits = {}
    for name, worker in workers.items():
        file = worker.ask(what)
        if file is not None:
            logits[name] = np.load(file).astype(np.float64).ravel()
    truth = logits.get("torch fp32", logits.get("vlmport fp32"))
    if truth is None:
        return {}
    return {
        name: float(one @ truth / np.linalg.norm(one) / np.linalg.norm(truth))
        for name, one in logits.items()
    }


def best_ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Figure → our best over the best peer's; above 1 we are faster."""
    ratios = {}
    for figure in sorted({name for row in figures.values() for name in row}):
        ours, theirs = (
            [row[figure] for name, row in figures.items() if figure in row and is_ours(name) == one]
            for one in (True, False)
        )
        if ours and theirs:
            faster = max if "per_s" in figure else min
            ratio = faster(ours) / faster(theirs)
            ratios[figure] = ratio if "per_s" in figure else 1 / ratio
    return ratios


def is_ours(name: str) -> bool:
    return name.startswith("vlmport")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="captioner", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each round")
    parser.add_argument("--small", action="store_true", help="2 layers, to try the script out")
    parser.add_argument("--only", default=",".join(ENGINES), help="engines, with commas")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the model's own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write, small = MODELS[arguments.model], arguments.small
        workload = write(folder, PRECISIONS, small=small, tokenizer=arguments.tokenizer)
        names = [one.strip() for one in arguments.only.split(",")]
        opened, failed = open_engines(names, folder, arguments.threads, arguments.tokens)
        try:
            workers = {name: worker for name, (worker, _) in opened.items()}
            cosines = {what: check_logits(workers, what) for what in ("text", "request")}
            kinds = dict.fromkeys(figure for _, figures in opened.values() for figure in figures)
            calls = {
                (name, figure): lambda worker=worker, figure=figure: worker.ask(figure)
                for figure in kinds
                for name, (worker, figures) in opened.items()
                if figure in figures
            }
            interleaved(calls, 1)  # not counted
            results = interleaved(calls, arguments.rounds)
            peaks = {name: worker.ask("peak") / 1e6 for name, worker in workers.items()}
        finally:
            for worker, _ in opened.values():
                worker.stop()
    figures: dict[str, dict[str, float]] = {name: {} for name in opened}
    for (name, figure), values in results.items():
        figures[name][figure] = round(median(values), 3)
    for name, peak in peaks.items():
        figures[name]["peak_mb"] = round(peak, 1)
    print_table(figures, [*kinds, "peak_mb"], cosines, failed)
    settings = {key: getattr(arguments, key) for key in ("model", "rounds", "tokens", "small")}
    report = {
        "benchmark": f"peers, {arguments.model}",
        "machine": describe_machine(arguments.threads, PACKAGES),
        "settings": settings | {"lengths": workload.lengths, "new_tokens": workload.new_tokens},
        "figures": figures,
        "cosines": cosines,
        "ratios": best_ratios(figures),
        "missing": failed,
    }
    print(json.dumps(report))


def print_table(
    figures: dict[str, dict[str, float]],
    kinds: list[str],
    cosines: dict[str, dict[str, float]],
    failed: dict[str, str],
) -> None:
    print(f"{'':18}" + "".join(f"{kind:>26}" for kind in kinds))
    for name, row in figures.items():
        cells = "".join(f"{row[kind]:26.1f}" if kind in row else f"{'-':>26}" for kind in kinds)
        print(f"{name:18}{cells}")
    ratios = best_ratios(figures)
    best = "".join(f"{ratios[k]:25.2f}x" if k in ratios else f"{'-':>26}" for k in kinds)
    print(f"{'ours : best peer':18}{best}")
    for what, values in cosines.items():
        named = ", ".join(f"{name} {value:.5f}" for name, value in values.items())
        print(f"cosine of the logits, {what}: {named or '-'}")
    for name, reason in failed.items():
        print(f"{name}: left out: {reason}")


if __name__ == "__main__":
    main()
