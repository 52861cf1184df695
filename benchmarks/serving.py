"""A server under several streams: tokens a second, and what each reader waits for.

    python benchmarks/serving.py --tokenizer FOLDER [--streams 1,4,16,32] [--requests N] [--small]
    python benchmarks/serving.py --url http://127.0.0.1:8080/v1 --model NAME    # another server

A stream is a reader that asks, reads the answer, waits for a random time and asks again, so that
requests arrive at random (Poisson arrivals, bounded by the number of streams). One request in four
has an image (--image-every); all images are different. Every answer has the same number of tokens.

For each number of streams: tokens a second of all streams, the time to the first token, and the
time between two tokens (median and 99th percentile), and the same of the tokens that arrived while
a prompt with an image was waiting for its first token. Prints a table, then one line of JSON.

The model has SmolVLM-256M's real size and random weights; with its own tokenizer most tokens have
a text, and only those can be timed. The server is a process of its own, on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import smolvlm
from PIL import Image

from vlmport.benchmark.machine import describe_machine
from vlmport.benchmark.picture import gradient
from vlmport.exporter import export

NAME = "bench"
READY_SECONDS = 300
PACKAGES = ("vlmport", "onnxruntime", "fastapi", "uvicorn")
TEXTS = ("What is in the picture?", "Describe the colors.", "Write a long story about a house. ")


@dataclass
class Answer:
    """The times of one answer, in seconds of one clock.

    Attributes:
        sent: when the request was sent.
        tokens: when each piece of text came.
        made: number of tokens, by the server's own count.
    """

    sent: float
    with_image: bool
    tokens: list[float] = field(default_factory=list)
    made: int = 0


def question(number: int, settings: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Return the messages of a request, and whether they have an image."""
    text, side, every = TEXTS[number % len(TEXTS)], settings.side, settings.image_every
    if not every or number % every != 0:
        return [{"role": "user", "content": f"{number}. {text * settings.repeat}"}], False
    file = io.BytesIO()
    pixels = gradient(side * 4 // 3, side).copy()
    pixels[0, 0] = number % 256, number // 256 % 256, number // 65536  # no two are the same
    Image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}], True


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event."""
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


async def ask(client: httpx.AsyncClient, number: int, settings: argparse.Namespace) -> Answer:
    """Send one request, and read its stream."""
    messages, with_image = question(number, settings)
    body = {
        "model": settings.model,
        "messages": messages,
        "max_tokens": settings.tokens,
        "temperature": 1,  # random weights would repeat one token, which may have no text
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.url is None:  # random weights may end at once
        body["min_new_tokens"] = settings.tokens
    answer = Answer(time.perf_counter(), with_image)
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]}")
        async for chunk in chunks(response):
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if chunk.get("usage"):
                answer.made = chunk["usage"]["completion_tokens"]
            if any(one["delta"].get("content") for one in chunk["choices"]):
                answer.tokens.append(time.perf_counter())
    return answer


async def load(url: str, streams: int, settings: argparse.Namespace, first: int) -> dict[str, Any]:
    """Run `streams` readers, and return the figures of all their answers."""
    answers: list[Answer] = []
    left = iter(range(first, first + settings.requests * max(streams, 4)))
    arrivals = random.Random(first)

    async def reader(client: httpx.AsyncClient) -> None:
        for number in left:
            await asyncio.sleep(arrivals.expovariate(1 / settings.pause))
            answers.append(await ask(client, number, settings))

    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        start = time.perf_counter()
        await asyncio.gather(*(reader(client) for _ in range(streams)))
    return figures(answers, time.perf_counter() - start)


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Summarize answers: times in milliseconds."""
    waits = [
        (one.sent, one.tokens[0]) for one in answers if one.with_image and one.tokens
    ]  # an image is encoded and its prompt is read
    between, meanwhile = [], []
    for answer in answers:
        for before, after in zip(answer.tokens, answer.tokens[1:], strict=False):
            between.append(after - before)
            if any(begin < after and before < end for begin, end in waits):
                meanwhile.append(after - before)
    found: dict[str, Any] = {
        "answers": len(answers),
        "tokens_per_s": round(sum(one.made for one in answers) / seconds, 2),
    }
    first = [one.tokens[0] - one.sent for one in answers if one.tokens]
    kinds = {"first_token": first, "between": between, "between_while_prompts": meanwhile}
    for name, values in kinds.items():
        if values:
            found[f"{name}_median_ms"] = round(1000 * statistics.median(values), 1)
            found[f"{name}_p99_ms"] = round(1000 * percentile(values, 0.99), 1)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def write_bundle(folder: Path, settings: argparse.Namespace) -> Path:
    """Export a model of random weights."""
    size = smolvlm.SMALL if settings.small else smolvlm.REAL
    checkpoint = smolvlm.write_smolvlm(folder / "checkpoint", size, settings.tokenizer)
    precisions = None if settings.precision == "auto" else settings.precision
    return export(checkpoint, folder / "bundle", precisions=precisions).folder


@contextlib.contextmanager
def served(bundle: Path, precision: str, running: int) -> Iterator[str]:
    """Run `vlmport serve` on a free port, and yield its base URL."""
    command = [sys.executable, "-m", "vlmport", "serve", f"{NAME}={bundle}", "--port", "0"]
    command += ["--precision", precision, "--max-running", str(running), "--preload"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        end = time.monotonic() + READY_SECONDS
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
            if time.monotonic() > end:
                raise RuntimeError("the server did not start")
        else:
            raise RuntimeError(f"the server ended with {process.wait()}")
        os.set_blocking(process.stdout.fileno(), False)  # its log is not read
        yield f"{found[0]}/v1/"
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", default="1,4,16,32", help="numbers of streams, with commas")
    parser.add_argument("--requests", type=int, default=3, help="of each stream")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="mean seconds between two requests"
    )
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--side", type=int, default=480, help="pixels of an image's height")
    parser.add_argument("--repeat", type=int, default=4, help="how often a text is repeated")
    parser.add_argument("--image-every", type=int, default=4, help="one request in N; 0: none")
    parser.add_argument("--bundle", type=Path, help="a bundle, instead of SmolVLM's real size")
    parser.add_argument("--small", action="store_true", help="2 layers, to try the script out")
    parser.add_argument("--tokenizer", type=Path, help="a folder with SmolVLM's own tokenizer")
    parser.add_argument("--url", help="base URL of another server")
    parser.add_argument("--model", default=NAME, help="the model's name there")
    settings = parser.parse_args()
    counts = [int(one) for one in settings.streams.split(",")]
    with contextlib.ExitStack() as stack:
        url = settings.url
        if url is None:
            bundle = settings.bundle or write_bundle(
                Path(stack.enter_context(tempfile.TemporaryDirectory())), settings
            )
            url = stack.enter_context(served(bundle, settings.precision, max(counts)))
        url = url.rstrip("/") + "/"
        found = {}
        asyncio.run(load(url, 1, settings, 0))  # not counted
        for number, streams in enumerate(counts):
            found[streams] = asyncio.run(load(url, streams, settings, 1000 * (number + 1)))
            print(f"{streams} streams: {found[streams]}", file=sys.stderr)
    print_table(found)
    machine = describe_machine(os.cpu_count() or 1, PACKAGES)
    kept = {
        name: value for name, value in vars(settings).items() if name not in ("tokenizer", "bundle")
    }
    print(
        json.dumps({"benchmark": "serving", "machine": machine, "settings": kept, "figures": found})
    )


def print_table(found: dict[int, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    print(f"{'streams':>32}" + "".join(f"{streams:>12}" for streams in found))
    for name in names:
        print(f"{name:>32}" + "".join(f"{row.get(name, '-'):>12}" for row in found.values()))


if __name__ == "__main__":
    main()
