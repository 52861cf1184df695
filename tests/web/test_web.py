"""The browser runtime: its own tests, and the same tokens as Python's in Chromium.

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.shapes_qwen import MODELS
from tests.transformers_js.test_transformers_js import HERE as TRANSFORMERS
from tests.transformers_js.test_transformers_js import Client, client
from tests.web import talks
from tests.web.endless import endless
from tests.web.matrix import damaged, matrix
from tests.web.pictures import write_pictures
from vlmport.builtin import builtin_models
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.demo import make_server
from vlmport.errors import ImageError
from vlmport.exporter import export
from vlmport.graph.precision import PRECISIONS
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
def node() -> str:
    """npx, after `npm ci` where package-lock.json is newer than what it installed."""
    npm, npx = shutil.which("npm"), shutil.which("npx")
    if npm is None or npx is None:
        missing("npm is not on PATH: install Node.js 20 or newer (nodejs.org)")
    installed, lock = WEB / "node_modules/.package-lock.json", WEB / "package-lock.json"
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


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in captioner in every precision that there is."""
    precisions = [name for name in SUFFIXES if name in PRECISIONS]
    folder = tmp_path_factory.mktemp("web") / "shapes"
    return export(builtin_models()["shapes"], folder, precisions=precisions, name="shapes")


@pytest.fixture(scope="session")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A bundle with next to no weights, and one with 200 MB."""
    folders = {}
    for name, text in (("tiny", None), ("large", LARGE)):
        folder = tmp_path_factory.mktemp(name)
        source = write_prefix_checkpoint(folder / "checkpoint", text=text, lora=False)
        folders[name] = str(export(source, folder / name, precisions="fp32").folder)
    return folders


MAIN = """
import { VLM } from '@vlmport/web';
const vlm = await VLM.load('./bundle/');
document.body.textContent = (await vlm.caption('./pictures/red_square.png')).text;
"""


@pytest.fixture(scope="session")
def packed(node: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two projects that use what `npm pack` packs: one as it is, one built by Vite."""
    folder = tmp_path_factory.mktemp("packed")
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
    return {"plain": str(plain), "built": str(project / "dist")}


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random model that cuts pictures into tiles and has a chat template."""
    folder = tmp_path_factory.mktemp("tiles")
    source = write_idefics3_checkpoint(folder / "source")
    return export(source, folder / "tiles", precisions="fp32,q8,q4")


# Built-in models that answer.
TRAINED = ("shapes-smolvlm", *MODELS)

# Options of the image processor that a test of each talking model sets.
TALKERS: dict[str, dict[str, Any]] = {
    "tiles": {"do_image_splitting": False},
    "windows": {"max_pixels": 3136},
    "lanes": {"max_pixels": 4096},
}


@pytest.fixture(scope="session")
def talkers(tiles: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Models that answer questions, random and trained; the Qwen ones have a graph of positions."""
    folder = tmp_path_factory.mktemp("talkers")
    found = {"tiles": tiles}
    for name, write in (("windows", write_qwen2_5), ("lanes", write_qwen3)):
        source = write(folder / f"{name}-source")
        found[name] = export(source, folder / name, precisions="fp32,q8")
    for name in TRAINED:
        found[name] = export(builtin_models()[name], folder / name, precisions="fp32,q8,q4")
    return found


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
def environment(
    node: str,
    chromium: str,
    client: Client,
    bundle: Bundle,
    sizes: dict[str, str],
    talkers: dict[str, Bundle],
    packed: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    """Both pages built, `vlmport demo` running, and where everything is."""
    run(node, "tsc", "--project", "tsconfig.build.json")
    run(node, "vite", "build", "--mode", "test")
    run(node, "vite", "build")
    folder = tmp_path_factory.mktemp("expected")
    kinds = write_pictures(folder / "kinds")
    (folder / "expected.json").write_text(json.dumps(expectations(bundle, talkers, kinds)))
    server = make_server(bundle, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {
        "CHROMIUM": chromium,
        "VLMPORT_WEB_BUNDLE": str(bundle.folder),
        "VLMPORT_WEB_PLAIN": packed["plain"],
        "VLMPORT_WEB_BUILT": packed["built"],
        "VLMPORT_WEB_TALKERS": json.dumps({name: str(one.folder) for name, one in talkers.items()}),
        "VLMPORT_WEB_TRANSFORMERS": str(
            TRANSFORMERS / "node_modules/@huggingface/transformers/dist"
        ),
        "VLMPORT_WEB_ENDLESS": json.dumps(endless(talkers["tiles"], folder / "endless")),
        "VLMPORT_WEB_TINY": sizes["tiny"],
        "VLMPORT_WEB_LARGE": sizes["large"],
        "VLMPORT_WEB_PICTURES": str(EXAMPLES),
        "VLMPORT_WEB_KINDS": str(folder / "kinds"),
        "VLMPORT_WEB_EXPECTED": str(folder / "expected.json"),
        "VLMPORT_WEB_DEMO": server.url,
    }
    server.shutdown()
    thread.join()
    server.close()


def test_the_code_is_formatted_and_typed(node: str) -> None:
    run(node, "prettier", "--check", ".")
    run(node, "tsc", "--project", "tsconfig.build.json")  # the pages import the built package
    run(node, "tsc", "--project", "tsconfig.build.json", "--noEmit")
    run(node, "tsc")


def test_the_parts_without_a_browser(node: str) -> None:
    run(node, "vitest", "run", "--project", "unit")


@pytest.mark.parametrize("name", BROWSER_TESTS)
def test_in_chromium(name: str, node: str, environment: dict[str, str]) -> None:
    run(node, "vitest", "run", "--project", "browser", f"browser/{name}", environment=environment)
