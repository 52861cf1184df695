"""The browser runtime gives the same tokens as Python's in Chromium.

Node runs them (web/browser/*.test.ts); here they get a bundle, what Python made of it, and
Chromium. No network is used but for installing what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.checkpoints import write_prefix_checkpoint
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.shapes_qwen import MODELS
from tests.sharing import run_folder, shared
from tests.transformers_js.test_transformers_js import HERE as TRANSFORMERS
from tests.transformers_js.test_transformers_js import Client, client
from tests.web import talks
from tests.web.endless import endless
from tests.web.matrix import damaged, matrix
from tests.web.pictures import write_pictures
from vlmport.bundle import Bundle
from vlmport.demo import make_server
from vlmport.errors import ImageError
from vlmport.exporter import export
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.model import VLM

__all__ = ["client"]  # a fixture: it installs transformers.js

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web"
EXAMPLES = ROOT / "examples"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
BROWSER_TESTS = sorted(path.name for path in (WEB / "browser").glob("*.test.ts"))

CUT = ("rgb.png", "subsampled.jpg", "tall.png")  # pictures with other numbers of tiles

# A decoder of 200 MB in float32: what its loading takes can be told from the browser's own memory.
LARGE = {
    "hidden_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "vocab_size": 1024,
}


def missing(what: str) -> None:
    """A loud skip at home, a failure where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(f"the web runtime is NOT TESTED: {what}")


def run(*command: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Run in web/; a failure shows all that was said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=WEB,
        env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}:\n{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> str:
    """npx, after `npm ci` where package-lock.json is newer than what it installed."""
    npm, npx = shutil.which("npm"), shutil.which("npx")
    if npm is None or npx is None:
        missing("npm is not on PATH: install Node.js 20 or newer (nodejs.org)")
    installed, lock = WEB / "node_modules/.package-lock.json", WEB / "package-lock.json"
    with FileLock(run_folder(tmp_path_factory) / "web.lock"):
        if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
            run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
            installed.touch()
    return npx


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium; Debian's is installed where that is allowed."""
    for name in ("CHROMIUM", *CHROMIUM):
        found = os.environ.get(name) if name == "CHROMIUM" else shutil.which(name)
        if found:
            return found
    apt = shutil.which("apt-get")
    if apt and os.geteuid() == 0:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run([apt, "-qq", *command], env=quiet, capture_output=True, timeout=900)
        if found := shutil.which("chromium"):
            return found
    missing("no Chromium: `apt-get install chromium`, or set CHROMIUM to its path")
    raise AssertionError


def sizes(folder: Path) -> dict[str, Path]:
    """A bundle with next to no weights, and one with 200 MB."""
    found = {}
    for name, text in (("tiny", None), ("large", LARGE)):
        source = write_prefix_checkpoint(folder / f"{name}-source", text=text, lora=False)
        found[name] = export(source, folder / name, precisions="fp32").folder
    return found


MAIN = """
import { VLM } from '@vlmport/web';
const vlm = await VLM.load('./bundle/');
document.body.textContent = (await vlm.caption('./pictures/red_square.png')).text;
"""


def packed(node: str, folder: Path) -> dict[str, Path]:
    """Two projects that use what `npm pack` packs: one as it is, one built by Vite."""
    folder.mkdir()
    run(Path(node).with_name("npm"), "pack", "--pack-destination", folder)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    html = '<!doctype html><body></body><script type="module" src="./main.js"></script>'
    plain, project = folder / "plain", folder / "project"
    shutil.copytree(folder / "package/dist/standalone", plain / "standalone")
    (plain / "main.js").write_text(MAIN.replace("@vlmport/web", "./standalone/vlmport.js"))
    modules = project / "node_modules"
    shutil.copytree(folder / "package", modules / "@vlmport/web")
    for name in ("onnxruntime-web", "onnxruntime-common", "@huggingface"):
        (modules / name).symlink_to(WEB / "node_modules" / name)
    (project / "main.js").write_text(MAIN)
    (project / "vite.config.js").write_text("export default { worker: { format: 'es' } };")
    for one in (plain, project):
        (one / "index.html").write_text(html)
    run(node, "vite", "build", project)
    return {"plain": plain, "built": project / "dist"}


# Built-in models that answer.
TRAINED = ("shapes-smolvlm", *MODELS)

# Options of the image processor that a test of each talking model sets.
TALKERS: dict[str, dict[str, Any]] = {
    "tiles": {"do_image_splitting": False},
    "windows": {"max_pixels": 3136},
    "lanes": {"max_pixels": 4096},
}


def talkers(folder: Path, built_in: Callable[[str], Bundle]) -> dict[str, Bundle]:
    """Models that answer questions, random and trained: the first cuts pictures into tiles, those
    of Qwen-VL's kinds have a graph of positions."""
    forms = (
        ("tiles", write_idefics3_checkpoint, "fp32,q8,q4"),
        ("windows", write_qwen2_5, "fp32,q8"),
        ("lanes", write_qwen3, "fp32,q8"),
    )
    found = {}
    for name, write, precisions in forms:
        source = write(folder / f"{name}-source")
        found[name] = export(source, folder / name, precisions=precisions)
    return found | {name: built_in(name) for name in TRAINED}


def captions_of_tiles(bundle: Bundle, pictures: list[Path]) -> dict[str, dict[str, Any]]:
    found = {}
    with VLM.open(bundle, precision="fp32") as vlm:
        for path in pictures:
            caption = vlm.caption(path, max_new_tokens=12)
            inputs = vlm.components.process_image(open_image(path)).inputs
            found[path.name] = {
                "tokens": caption.token_ids,
                "text": caption.text,
                "count": inputs["pixel_values"].shape[1],
                "imageTokens": caption.counts["image_tokens"],
            }
    return found


def expectations(
    bundle: Bundle, talkers: Mapping[str, Bundle], kinds: list[Path]
) -> dict[str, Any]:
    """What Python's runtime gives, as web/browser/support.ts reads it."""
    captions: dict[str, dict[str, Any]] = {path.name: {} for path in sorted(EXAMPLES.glob("*.png"))}
    for precision in bundle.manifest.precisions:
        with VLM.open(bundle, precision=precision) as vlm:
            for name, found in captions.items():
                caption = vlm.caption(EXAMPLES / name)
                found[precision] = {"tokens": caption.token_ids, "text": caption.text}
    with VLM.open(bundle, precision="fp32") as vlm:
        rgb = open_image(EXAMPLES / next(iter(captions)))
        (values,) = vlm.components.process_image(rgb).inputs.values()
    pixels = {}
    for path in kinds:
        rgb = open_image(path)
        height, width, _ = rgb.shape
        digest = hashlib.sha256(rgb.tobytes()).hexdigest()
        pixels[path.name] = {"width": width, "height": height, "sha256": digest}
    return {
        "precisions": bundle.manifest.precisions,
        "captions": captions,
        "pixels": pixels,
        "talks": {
            name: talks.trained_talks(talker, EXAMPLES)
            if name in TRAINED
            else talks.talks(talker, kinds[0].parent, TALKERS[name])
            for name, talker in talkers.items()
        },
        "tiles": captions_of_tiles(talkers["tiles"], [path for path in kinds if path.name in CUT]),
        "matrix": read_matrix(kinds[0].parent / "matrix"),
        "pixelValues": {"dims": values.shape, "data": values.ravel().tolist()},
    }


def read_matrix(folder: Path) -> dict[str, dict[str, Any]]:
    """Write all files; of each its number, and what Python reads or refuses it with."""
    folder.mkdir()
    found: dict[str, dict[str, Any]] = {}
    for number, (name, data) in enumerate((matrix() | damaged()).items()):
        (folder / f"{number}.bin").write_bytes(data)
        try:
            rgb = open_image(data)
        except ImageError as error:
            found[name] = {"number": number, "code": error.code}
            continue
        height, width, _ = rgb.shape
        digest = hashlib.sha256(rgb.tobytes()).hexdigest()
        found[name] = {"number": number, "width": width, "height": height, "sha256": digest}
    return found


@pytest.fixture(scope="session")
def site(
    node: str,
    built_in: Callable[[str], Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Both pages built, all bundles, and what Python makes of them: where each is."""

    def make(folder: Path) -> None:
        folder.mkdir()
        run(node, "tsc", "--project", "tsconfig.build.json")
        run(node, "vite", "build", "--mode", "test")
        run(node, "vite", "build")
        bundle, answering = built_in("shapes"), talkers(folder / "talkers", built_in)
        kinds = write_pictures(folder / "kinds")
        expected = expectations(bundle, answering, kinds)
        (folder / "expected.json").write_text(json.dumps(expected))
        projects, models = packed(node, folder / "packed"), sizes(folder / "sizes")
        told = {
            "BUNDLE": bundle.folder,
            "PLAIN": projects["plain"],
            "BUILT": projects["built"],
            "TALKERS": {name: str(one.folder) for name, one in answering.items()},
            "ENDLESS": endless(answering["tiles"], folder / "endless"),
            "TINY": models["tiny"],
            "LARGE": models["large"],
            "KINDS": folder / "kinds",
            "EXPECTED": folder / "expected.json",
        }
        texts = {key: json.dumps(v) if isinstance(v, dict) else str(v) for key, v in told.items()}
        (folder / "site.json").write_text(json.dumps(texts))

    folder = shared(tmp_path_factory, "web", make)
    return json.loads((folder / "site.json").read_text())


@pytest.fixture(scope="session")
def environment(
    site: dict[str, str], chromium: str, client: Client, built_in: Callable[[str], Bundle]
) -> Iterator[dict[str, str]]:
    """Where everything is, and `vlmport demo` running."""
    server = make_server(built_in("shapes"), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {
        "CHROMIUM": chromium,
        **{f"VLMPORT_WEB_{name}": where for name, where in site.items()},
        "VLMPORT_WEB_TRANSFORMERS": str(
            TRANSFORMERS / "node_modules/@huggingface/transformers/dist"
        ),
        "VLMPORT_WEB_PICTURES": str(EXAMPLES),
        "VLMPORT_WEB_DEMO": server.url,
    }
    server.shutdown()
    thread.join()
    server.close()


@pytest.mark.parametrize("name", BROWSER_TESTS)
def test_in_chromium(name: str, node: str, environment: dict[str, str]) -> None:
    run(node, "vitest", "run", "--project", "browser", f"browser/{name}", environment=environment)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["turns.test.ts", "tokens.test.ts", "probe.test.ts"])
def test_the_rest_in_chromium(name: str, node: str, environment: dict[str, str]) -> None:
    """What the suite leaves out: a GPU in software takes half a minute for each of them."""
    run(node, "vitest", "run", "--project", "browser", f"browser/{name}", environment=environment)
