"""The browser runtime: its own tests, and the same tokens as Python's in Chromium.

Node runs them (web/browser/*.test.ts); here they get a bundle, what Python made of it, and
Chromium. No network is used but for installing what is missing.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.checkpoints import write_prefix_checkpoint
from tests.transformers_js.test_transformers_js import HERE as TRANSFORMERS
from tests.transformers_js.test_transformers_js import Client, client
from tests.web.conftest import BROWSER_TESTS, EXAMPLES, WEB, Environment, run, run_in_chromium
from vlmport.bundle import Bundle
from vlmport.demo import make_server
from vlmport.export import export
from vlmport.runtime.images import open_image
from vlmport.runtime.model import VLM

__all__ = ["client"]  # a fixture: it installs transformers.js

FILES = [name for name in BROWSER_TESTS if name != "turns.test.ts"]  # test_turns.py runs that one

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
def packed(
    node: str, building: FileLock, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Two projects that use what `npm pack` packs: one as it is, one built by Vite."""
    folder = tmp_path_factory.mktemp("packed")
    with building:
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


def expectations(bundle: Bundle, tiles: Bundle, kinds: list[Path]) -> dict[str, Any]:
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
        "tiles": captions_of_tiles(tiles, [path for path in kinds if path.name in CUT]),
        "pixelValues": {"dims": values.shape, "data": values.ravel().tolist()},
    }


@pytest.fixture(scope="session")
def environment(
    environment_of: Environment,
    client: Client,
    bundle: Bundle,
    sizes: dict[str, str],
    tiles: Bundle,
    kinds: list[Path],
    packed: dict[str, str],
) -> Iterator[dict[str, str]]:
    """Everything that the tests of the browser read; `vlmport demo` is running."""
    transformers = TRANSFORMERS / "node_modules/@huggingface/transformers/dist"
    server = make_server(bundle, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {
        **environment_of({"tiles": tiles}, expectations(bundle, tiles, kinds)),
        "VLMPORT_WEB_PLAIN": packed["plain"],
        "VLMPORT_WEB_BUILT": packed["built"],
        "VLMPORT_WEB_TRANSFORMERS": str(transformers),
        "VLMPORT_WEB_TINY": sizes["tiny"],
        "VLMPORT_WEB_LARGE": sizes["large"],
        "VLMPORT_WEB_DEMO": server.url,
    }
    server.shutdown()
    thread.join()
    server.close()


def test_the_code_is_formatted_and_typed(node: str, building: FileLock) -> None:
    run(node, "prettier", "--check", ".")
    with building:
        run(node, "tsc", "--project", "tsconfig.build.json")  # the pages import the built package
    run(node, "tsc", "--project", "tsconfig.build.json", "--noEmit")
    run(node, "tsc")


def test_the_parts_without_a_browser(node: str) -> None:
    run(node, "vitest", "run", "--project", "unit")


@pytest.mark.parametrize("name", FILES)
def test_in_chromium(name: str, node: str, environment: dict[str, str]) -> None:
    run_in_chromium(node, name, environment)
