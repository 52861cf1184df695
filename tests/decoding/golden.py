"""Write testdata/golden/: recorded logits, and what decoding makes of them.

`python -m tests.decoding.golden` writes the files, `--check` says whether they are what it would
write. Tokens and scores are those of transformers' own `generate`, with our random stream where it
draws; a case on which the two sides differ is not written. The options that transformers lacks
(OURS) are recorded without this comparison. A case must also survive logits that
are a millionth off, so that no second implementation fails for its last bit; those whose point is
that tokens are equal can't, and say so by their name.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.decoding import golden_options
from tests.decoding.reference import Table
from tests.decoding.running import Request, assert_equal, logits_for, run
from tests.decoding.tables import table
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.rng import draw_several, next_word, stream, uniform
from vlmport.runtime.decoding.warpers import new_warpers

GOLDEN = Path(__file__).parents[2] / "testdata/golden"
FORMAT = 1
STREAMS = [(0, 0), (0, 1), (1, 0), (11, 3), (123456789, 0), (2**32 - 1, 0), (2**32 - 1, 63)]
SAMPLING = {"do_sample": True, "seed": 11, "num_return_sequences": 2}
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
BEAM_SAMPLING = {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "seed": 5}

PROCESSORS: dict[str, list[Any]] = {
    "sequence_bias": [[[[3], 2.0], [[4, 5], 3.0], [[6, 5], -4.5], [[2, 7, 5], -90.0]]],
    "encoder_repetition_penalty": [1.3],
    "repetition_penalty": [1.3, 0.8],
    "no_repeat_ngram_size": [1, 2],
    "encoder_no_repeat_ngram_size": [2],
    "bad_words_ids": [[[5], [2, 3], [7, 7, 7], [0]]],
    "min_new_tokens": [7],
    "min_length": [9],
    "forced_eos_token_id": [0, [0, 3]],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [[2, 1.5]],
    "suppress_tokens": [[0, 2, 5]],
    "begin_suppress_tokens": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "renormalize_logits": [True],
}
WARPERS: dict[str, list[Any]] = {
    "temperature": [0.5, 1.7, 1e-6],
    "top_h": [0.37, 0.83],
    "top_k": [0, 1, 5, None],
    "top_p": [0.3, 0.9],
    "min_p": [0.07, 0.4],
    "typical_p": [0.2, 0.7],
    "epsilon_cutoff": [0.0123],
    "eta_cutoff": [0.3],
}
OF_BEAMS: dict[str, list[Any]] = {
    "early_stopping": [True, False, "never"],
    "length_penalty": [-1.5, 0.0, 2.0],
    "num_beams": [2, 5],
}
OURS = {"presence_penalty": 0.9, "frequency_penalty": 0.7}
TOGETHER = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
NARROW = {"temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.02}


def cases() -> dict[str, Iterator[tuple[str, Request, Table]]]:
    """The cases of each file: a name, a request and what it runs over."""
    return {
        "greedy": _of("greedy", {}, PROCESSORS),
        "sampling": _of("sampling", SAMPLING, PROCESSORS | WARPERS),
        "beams": _of("beams", BEAMS, PROCESSORS | OF_BEAMS),
        "beam_sampling": _of("beam sampling", BEAM_SAMPLING, PROCESSORS | WARPERS | OF_BEAMS),
    }


def _of(
    mode: str, base: dict[str, Any], choices: dict[str, list[Any]]
) -> Iterator[tuple[str, Request, Table]]:
    n = 0
    for name, values in choices.items():
        for value in values:
            options = {**base, name: value}
            if options.get("num_return_sequences", 1) > options.get("num_beams", 3):
                options["num_return_sequences"] = options["num_beams"]
            request = Request(options, stop_token_ids=(0, 6))
            yield f"{mode}: {name}={value}", request, table(n, forbidden=0.1 * (n % 3 == 2))
            n += 1
    narrow = {**TOGETHER, **(NARROW if base.get("do_sample") else {})}
    several = Request({**base, **narrow}, stop_token_ids=(0, 4, 9))
    yield f"{mode}: alone", Request(base), table(100)
    yield f"{mode}: log-probabilities", Request({**base, "logprobs": 3}), table(101)
    yield f"{mode}: three stop tokens, options together", several, table(102)
    yield f"{mode}: new tokens seen only", replace(several, processors_see_prompt=False), table(103)
    yield f"{mode}: one token", replace(several, max_new_tokens=3), table(104, scale=0.5)
    yield f"{mode}: equal columns", Request(base), table(105, equal=14)
    yield f"{mode}: equal rows", Request(base), table(106, flat=20)
    yield f"{mode}: 200 tokens", Request(base, max_new_tokens=4), table(107, 200)
    if base.get("do_sample"):  # on the edge: what is just not kept, and what just is
        level = table(108, 10, flat=61)
        yield f"{mode}: top_p=0.9 of equals", Request({**base, "top_p": 0.9}), level
        yield f"{mode}: min_p=1.0 of equals", Request({**base, "min_p": 1.0}), level
    for name, value in OURS.items():
        yield f"{mode}: {name}={value}", Request({**base, name: value}), table(110)
    yield f"{mode}: presence and frequency", Request({**base, **OURS}), table(111, flat=30)
    if base.get("num_beams"):
        short = {**base, "early_stopping": "never", "length_penalty": -1.5}
        short["num_return_sequences"] = 3
        yield f"{mode}: never early, short ones preferred", Request(short), table(18, 5)


def record(name: str, request: Request, logits: Table) -> dict[str, Any]:
    """Run a case and write down what it was given and what came of it."""
    search, steps = request.search(logits), []
    while not search.done:
        rows = logits_for(logits, search)
        choice = search.choose(rows)
        steps.append(
            {
                "logits": base64.b64encode(rows.astype("<f4").tobytes()).decode(),
                "tokens": list(choice.tokens),
                "parents": list(choice.parents),
            }
        )
    if not OURS.keys() & request.options.keys():
        assert_equal(search, request.expected(logits))
    results: list[dict[str, Any]] = []
    for one in search.results():
        result: dict[str, Any] = {"tokens": list(one.tokens), "stop_reason": one.stop_reason}
        if one.score is not None:
            result["score"] = one.score
        if one.logprobs is not None:
            result["logprobs"] = [
                {"logprob": place.logprob, "top": [list(pair) for pair in place.top]}
                for place in one.logprobs
            ]
        results.append(result)
    return {
        "name": name,
        "options": dict(request.options),
        "prompt_ids": list(request.prompt_ids),
        "processors_see_prompt": request.processors_see_prompt,
        "stop_token_ids": list(request.stop_token_ids),
        "max_new_tokens": request.max_new_tokens,
        "vocab_size": logits.vocab_size,
        "steps": steps,
        "results": results,
    }


def check_margin(name: str, request: Request, logits: Table) -> None:
    """Raise ValueError where logits that are a millionth off give other tokens."""
    answers = set()
    for seed in range(4):
        off = 1 + 1e-6 * np.random.default_rng(seed).uniform(-1, 1, logits.rows.shape)
        moved = Table((logits.rows * (off if seed else 1)).astype(np.float32))
        answers.add(tuple(one.tokens for one in run(request.search(moved), moved).results()))
    if len(answers) > 1:
        raise ValueError(f"{name}: hangs on a last bit, choose other logits")


LARGE: list[dict[str, Any]] = [
    {"top_k": 0},
    {"temperature": 0.7},
    {"top_k": 0, "top_p": 0.5},
    {"top_k": 0, "top_p": 0.95, "temperature": 1.5},
    {"top_k": 0, "top_p": 0.9995},
    {"top_k": 0, "min_p": 0.01},
    {"top_k": 0, "typical_p": 0.3},
    {"top_k": 0, "epsilon_cutoff": 3e-4},
    {"top_k": 0, "eta_cutoff": 2e-3},
    {"top_k": 0, "top_h": 0.4},
    {"top_k": 1000, "top_p": 0.9, "min_p": 1e-3},
]


def large() -> dict[str, Any]:
    """Rows of real width, made of the random stream: which tokens each option keeps and samples.

    The n-th score is float32((u + v + w - 1.5) * scale), of three uniform numbers in turn.
    """
    vocab_size, scale, seed, draws = 20_000, 6.0, 21, 4
    state, numbers = stream(seed, 0), []
    for _ in range(3 * vocab_size):
        number, state = uniform(state)
        numbers.append(number)
    u, v, w = np.array(numbers).reshape(vocab_size, 3).T
    row = ((u + v + w - 1.5) * scale).astype(np.float32)
    found = []
    for given in LARGE:
        options = {"do_sample": True, "seed": 4, "num_return_sequences": draws, **given}
        search = Request(options, max_new_tokens=1).search(Table(row[None]))
        search.choose(row[None])
        kept = np.flatnonzero(_processed(GenerationOptions.of(options), row) > -np.inf)
        tokens = [one.tokens[0] for one in search.results()]
        found.append(
            {"options": options, "kept": len(kept), "sum": int(kept.sum()), "tokens": tokens}
        )
    beams = Request({"num_beams": 40, "num_return_sequences": 40}, max_new_tokens=1)
    search = beams.search(Table(row[None]))
    search.choose(row[None])
    best = [one.tokens[0] for one in search.results()]
    made = {"vocab_size": vocab_size, "scale": scale, "seed": seed}
    return {"row": {**made, "best": best}, "cases": found}


def _processed(options: GenerationOptions, row: np.ndarray) -> np.ndarray:
    """A row after all warpers of the options."""
    scores = row.copy()
    for warper in new_warpers(options, 1):
        scores = warper(scores)
    return scores


def streams() -> dict[str, Any]:
    """The random stream, and draws from it."""
    started = [(seed, sequence, stream(seed, sequence)) for seed, sequence in STREAMS]
    random = np.random.default_rng(8)
    draws = []
    for seed in range(12):
        scores = (random.standard_normal(20) * (1 + seed)).astype(np.float32)
        scores[random.random(20) < 0.05 * seed] = -30.0
        count = [1, 1, 6, 20][seed % 4]
        draws.append(
            {
                "seed": seed,
                "scores": scores.tolist(),
                "count": count,
                "drawn": draw_several(scores, count, stream(seed, 0))[0],
            }
        )
    return {
        "xoshiro128**": {"state": [1, 2, 3, 4], "words": _several(next_word, (1, 2, 3, 4), 10)},
        "streams": [
            {
                "seed": seed,
                "sequence": sequence,
                "state": list(state),
                "words": _several(next_word, state, 6),
                "uniform": _several(uniform, state, 3),
            }
            for seed, sequence, state in started
        ],
        "draws": draws,
    }


def _several(step: Any, state: Any, count: int) -> list[Any]:
    found = []
    for _ in range(count):
        one, state = step(state)
        found.append(one)
    return found


def contents() -> dict[str, dict[str, Any]]:
    """All files by name."""
    files: dict[str, dict[str, Any]] = {
        name: {"cases": [record(*one) for one in of]} for name, of in cases().items()
    }
    files["options"] = {"cases": list(golden_options.cases())}
    files |= {"large": large(), "random": streams()}
    return {name: {"format": FORMAT, **file} for name, file in files.items()}


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two files differ; numbers with a fraction may by a millionth."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return [] if math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-6) else [where]
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [d for key in ours for d in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for n, pair in pairs for d in differences(*pair, f"{where}[{n}]")]
    return [] if ours == theirs else [where]


def check(folder: Path = GOLDEN) -> list[str]:
    """Where the files differ from what this program would write."""
    found = []
    for name, content in contents().items():
        path = folder / f"{name}.json"
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        found += differences(json.loads(json.dumps(content)), there, path.name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    if parser.parse_args().check:
        found = check()
        print("\n".join(found[:20]) or "testdata/golden is up to date", file=sys.stderr)
        return int(bool(found))
    for of in cases().values():
        for case in of:
            if "equal" not in case[0]:
                check_margin(*case)
    for name, content in contents().items():
        path = GOLDEN / f"{name}.json"
        path.write_text(_lines(content), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size:,} bytes", file=sys.stderr)
    return 0


def _lines(content: dict[str, Any]) -> str:
    """JSON with a line for each case, so that a diff says which changed."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            inner = ",\n  ".join(json.dumps(one, separators=(",", ":")) for one in value)
            parts.append(f'"{key}": [\n  {inner}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    raise SystemExit(main())
