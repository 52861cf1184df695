"""Captions in Chromium: this package beside transformers.js on the same bundle, and Python.

    python benchmarks/web.py [--rounds N] [--repeats N] [--no-webgpu]
    python benchmarks/web.py --memory           # peak memory of loading 200 MB of weights

The clients take turns, each in a new page of the same browser, for a few rounds; figures are
medians of all rounds, the first caption of each page left out. The time to the first token counts
from the picture's file, and a second figure is a 12-megapixel photograph made ready: decoded,
processed, encoded. WebGPU is a GPU in software (SwiftShader), which says that it works and nothing
about speed. Prints the rows of docs/web.md's table, then one line of JSON. Needs `make test` to
have run once, which installs and builds what is used here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported

import numpy as np
import onnxruntime
from PIL import Image

import vlmport
from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle
from vlmport.demo import DemoServer
from vlmport.exporter import export
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "web/browser/built"
MODULES = ROOT / "tests/transformers_js/node_modules"
PICTURE = "red_circle_orange_star_blue_star.png"
IMPORTS = {
    "@huggingface/transformers": "./tjs/transformers.web.js",
    "onnxruntime-web/webgpu": "./tjs/ort.webgpu.bundle.min.mjs",
    "onnxruntime-common": "./tjs/common/index.js",
}
WIDTH, HEIGHT = 4000, 3000
HEADER = "| | first token, ms | tokens/s | 12-megapixel photo to features, ms |"
CLIENTS = {"vlmport": "@vlmport/web", "transformers": "transformers.js", "python": "Python"}
DEVICES = {"wasm": "WASM", "webgpu": "WebGPU in software"}


def write_page(folder: Path) -> None:
    """The browser tests' page, with transformers.js and the pictures beside it."""
    shutil.copytree(BUILT, folder)
    transformers, ort = MODULES / "@huggingface/transformers/dist", MODULES / "onnxruntime-web/dist"
    (folder / "tjs").mkdir()
    shutil.copy(transformers / "transformers.web.js", folder / "tjs")
    for name in ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify"):
        for file in ort.glob(f"{name}*"):
            if file.suffix != ".map":
                shutil.copy(file, folder / "tjs")
    shutil.copytree(MODULES / "onnxruntime-common/dist/esm", folder / "tjs/common")
    html = (folder / "index.html").read_text()
    imports = f'<script type="importmap">{json.dumps({"imports": IMPORTS})}</script>'
    (folder / "index.html").write_text(html.replace("<head>", f"<head>{imports}"))
    shutil.copy(ROOT / "examples" / PICTURE, folder / "picture.png")
    photo(folder / "photo.jpg")


def photo(path: Path) -> None:
    """A picture as large as a telephone's, with detail everywhere."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 12, (HEIGHT, WIDTH))
    waves = [128 + 80 * np.sin(x / a + y / b) + noise for a, b in ((90, 70), (50, -80), (-30, 60))]
    pixels = np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


@contextmanager
def serving(page: Path, bundle: Bundle) -> Iterator[str]:
    server = DemoServer(page, bundle)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.url
    server.shutdown()
    thread.join()
    server.close()


def in_chromium(url: str, **task: Any) -> dict[str, Any]:
    task = {"bundle": "/bundle/", "picture": "/picture.png", "photo": None} | task
    command = ["node", str(ROOT / "benchmarks/web.mjs"), url, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def in_python(bundle: Bundle, precision: str, threads: int, repeats: int) -> dict[str, Any]:
    runs = []
    with VLM.open(bundle, precision=precision, threads=threads) as vlm:
        for repeat in range(-1, repeats):
            vlm.features.clear()
            caption = vlm.caption(ROOT / "examples" / PICTURE)
            tokens, times = len(caption.token_ids), caption.timings
            first = 1000 * (times["image"] + times["prefill"])
            per_second = (tokens - 1) / times["decode"]
            if repeat >= 0:
                runs.append({"first": first, "perSecond": per_second, "text": caption.text})
    return {"runs": runs, "photos": [], "load": None, "browser": None}


def speed(folder: Path, rounds: int, repeats: int, webgpu: bool) -> list[dict[str, Any]]:
    bundle = export(builtin_models()["shapes"], folder / "bundle", precisions="fp32,q8,q4")
    write_page(folder / "page")
    forms = [("wasm", precision, threads) for precision in ("fp32", "q8") for threads in (1, 2)]
    forms += [("webgpu", "q4", 1)] * webgpu
    tasks = [(client, *form) for form in forms for client in ("vlmport", "transformers")]
    tasks += [("python", "cpu", name, n) for name in ("fp32", "q8", "q4") for n in (1, 2)]
    found: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {task: [] for task in tasks}
    with serving(folder / "page", bundle) as url:
        for _ in range(rounds):
            for client, device, precision, threads in tasks:
                task = {"precision": precision, "threads": threads, "repeats": repeats}
                if client == "python":
                    got = in_python(bundle, **task)
                else:
                    photo = "/photo.jpg" if (client, device) == ("vlmport", "wasm") else None
                    got = in_chromium(url, client=client, device=device, photo=photo, **task)
                found[client, device, precision, threads].append(got)
    rows = []
    for (client, device, precision, threads), got in found.items():
        task = {"client": client, "device": device, "precision": precision, "threads": threads}
        rows.append(task | summary(got))
        print(line(rows[-1]), flush=True)
    return rows


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def median(values: list[float]) -> float | None:
        return round(statistics.median(values), 1) if values else None

    runs = [run for got in rounds for run in got["runs"]]
    texts = {run["text"] for run in runs}
    assert len(texts) == 1, texts
    return {
        "first_ms": median([one["first"] for one in runs]),
        "tokens_per_s": median([one["perSecond"] for one in runs]),
        "photo_ms": median([ms for got in rounds for ms in got["photos"]]),
        "load_ms": median([got["load"] for got in rounds if got["load"]]),
        "text": texts.pop(),
        "browser": rounds[0]["browser"],
    }


def versions() -> dict[str, str]:
    """Of all that is compared."""
    packages = {
        "onnxruntime-web": ROOT / "web/node_modules/onnxruntime-web",
        "transformers.js": MODULES / "@huggingface/transformers",
        "transformers.js's onnxruntime-web": MODULES / "onnxruntime-web",
    }
    found = {
        name: str(json.loads((folder / "package.json").read_text())["version"])
        for name, folder in packages.items()
    }
    return found | {"onnxruntime": onnxruntime.__version__, "vlmport": vlmport.__version__}


def line(row: dict[str, Any]) -> str:
    """A row of the table in docs/web.md."""
    place = "" if row["client"] == "python" else f"{DEVICES[row['device']]}, "
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    name = f"{CLIENTS[row['client']]}, {place}{row['precision']}, {threads}"
    numbers = (row[key] for key in ("first_ms", "tokens_per_s", "photo_ms"))
    return (
        "| " + " | ".join([name, *("" if one is None else f"{one:.0f}" for one in numbers)]) + " |"
    )


def memory(folder: Path) -> list[dict[str, Any]]:
    """The peak of the page's process while it loads, over that of a page with a tiny bundle."""
    sys.path.insert(0, str(ROOT))
    from tests.checkpoints import write_prefix_checkpoint
    from tests.web.test_web import LARGE

    write_page(folder / "page")
    peaks, sizes = {}, {}
    for name, text in (("tiny", None), ("large", LARGE)):
        source = write_prefix_checkpoint(folder / f"{name}-checkpoint", text=text, lora=False)
        bundle = export(source, folder / name, precisions="fp32,q8,q4")
        for device, precision in (("wasm", "fp32"), ("wasm", "q8")):
            task = {"device": device, "precision": precision, "threads": 1, "repeats": None}
            with serving(folder / "page", bundle) as url:
                got = [in_chromium(url, client="vlmport", **task)["peak"] for _ in range(3)]
            peaks[name, device, precision] = statistics.median(got)
            choice = bundle.manifest.choose(precision, device)
            variants = [bundle.variant(one, form) for one, form in choice.items()]
            paths = [path for one in variants for path in (one.model, *one.data)]
            sizes[name, device, precision] = sum(bundle.manifest.files[path].size for path in paths)
    rows = []
    for (name, device, precision), peak in peaks.items():
        if name == "tiny":
            continue
        tiny = ("tiny", device, precision)
        weights = sizes[name, device, precision] - sizes[tiny]
        times = (peak - peaks[tiny]) / weights
        rows.append({"device": device, "precision": precision, "weights": weights, "times": times})
        told = f"{weights / 1e6:.0f} MB of weights, peak {(peak - peaks[tiny]) / 1e6:.0f} MB over"
        print(f"{device} {precision}: {told} a tiny model's: {times:.2f} times the weights")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="captions in each round")
    parser.add_argument("--no-webgpu", action="store_true")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if not BUILT.is_dir() or not MODULES.is_dir():
        sys.exit("the pages are not built: run `make test` once")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        if given.memory:
            rows = memory(Path(folder))
        else:
            print(f"{HEADER}\n| --- | --- | --- | --- |")
            rows = speed(Path(folder), given.rounds, given.repeats, not given.no_webgpu)
    machine = {"machine": processor(), "cores": os.cpu_count(), "load": load}
    print(json.dumps({"rows": rows, "versions": versions(), **machine}))


def processor() -> str:
    """The processor's name, where Linux tells it."""
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.is_file() else []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
