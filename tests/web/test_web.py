"""The browser runtime: its own tests, and the same tokens as Python's in Chromium.

Node runs them (web/browser/*.test.ts); here they get a bundle, what Python made of it, and
Chromium. No network is used but for installing what is missing.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.transformers_js.test_transformers_js import HERE as TRANSFORMERS
from tests.transformers_js.test_transformers_js import Client, client
from tests.web.conftest import WEB, run, run_in_chromium
from tests.web.test_loading import FILES as LOADING
from tests.web.test_turns import FILE as TURNS

__all__ = ["client"]  # a fixture: it installs transformers.js

BROWSER_TESTS = {path.name for path in (WEB / "browser").glob("*.test.ts")}

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


def test_the_code_is_formatted_and_typed(node: str, building: FileLock) -> None:
    run(node, "prettier", "--check", ".")
    with building:
        run(node, "tsc", "--project", "tsconfig.build.json")  # the pages import the built package
    run(node, "tsc", "--project", "tsconfig.build.json", "--noEmit")
    run(node, "tsc")


def test_the_parts_without_a_browser(node: str) -> None:
    run(node, "vitest", "run", "--project", "unit")


@pytest.mark.parametrize("name", sorted(BROWSER_TESTS - {*LOADING, TURNS}))
def test_in_chromium(
    name: str, node: str, environment: dict[str, str], client: Client, packed: dict[str, str]
) -> None:
    transformers = TRANSFORMERS / "node_modules/@huggingface/transformers/dist"
    more = {
        "VLMPORT_WEB_PLAIN": packed["plain"],
        "VLMPORT_WEB_BUILT": packed["built"],
        "VLMPORT_WEB_TRANSFORMERS": str(transformers),
    }
    run_in_chromium(node, name, {**environment, **more})
