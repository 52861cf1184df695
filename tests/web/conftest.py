"""Node, Chromium, and the pages that Node builds, once for all workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import FileLock

from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.web.expected import EXAMPLES, expectations
from tests.web.pictures import write_pictures
from vlmport.builtin import builtin_models
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.export import export
from vlmport.graph.precision import PRECISIONS

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

Environment = Callable[..., dict[str, str]]


def missing(what: str) -> NoReturn:
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


def run_in_chromium(node: str, name: str, environment: Mapping[str, str]) -> None:
    """One file of web/browser/."""
    run(node, "vitest", "run", "--project", "browser", f"browser/{name}", environment=environment)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def building(shared: Path) -> FileLock:
    """Held by whoever writes into web/."""
    return FileLock(shared / "web.lock")


@pytest.fixture(scope="session")
def node(building: FileLock) -> str:
    """npx, after `npm ci` where package-lock.json is newer than what it installed."""
    npm, npx = shutil.which("npm"), shutil.which("npx")
    if npm is None or npx is None:
        missing("npm is not on PATH: install Node.js 20 or newer (nodejs.org)")
    installed, lock = WEB / "node_modules/.package-lock.json", WEB / "package-lock.json"
    with building:
        if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
            run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
            installed.touch()
    return npx


@pytest.fixture(scope="session")
def chromium(building: FileLock) -> str:
    """A Chromium; Debian's is installed where that is allowed."""
    with building:
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


@pytest.fixture(scope="session")
def pages(node: str, building: FileLock, shared: Path) -> None:
    """The tests' page and the demo's are built; by one worker, the others wait."""
    built = shared / "web-is-built"
    with building:
        if not built.exists():
            run(node, "tsc", "--project", "tsconfig.build.json")
            run(node, "vite", "build", "--mode", "test")
            run(node, "vite", "build")
            built.touch()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in captioner in every precision that there is."""
    precisions = [name for name in SUFFIXES if name in PRECISIONS]
    folder = tmp_path_factory.mktemp("web") / "shapes"
    return export(builtin_models()["shapes"], folder, precisions=precisions, name="shapes")


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random model that cuts pictures into tiles and has a chat template."""
    folder = tmp_path_factory.mktemp("tiles")
    source = write_idefics3_checkpoint(folder / "source")
    return export(source, folder / "tiles", precisions="fp32,q8,q4")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small pictures of all kinds."""
    return write_pictures(tmp_path_factory.mktemp("kinds") / "kinds")


@pytest.fixture(scope="session")
def environment_of(
    pages: None,
    chromium: str,
    bundle: Bundle,
    kinds: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Environment:
    """What every file of web/browser/ reads (support.ts): (bundles that answer, what Python's
    runtime gives) → environment."""

    def made(talkers: Mapping[str, Bundle], expected: Mapping[str, Any]) -> dict[str, str]:
        file = tmp_path_factory.mktemp("expected") / "expected.json"
        file.write_text(json.dumps(expected))
        folders = {name: str(one.folder) for name, one in talkers.items()}
        return {
            "CHROMIUM": chromium,
            "VLMPORT_WEB_BUNDLE": str(bundle.folder),
            "VLMPORT_WEB_TALKERS": json.dumps(folders),
            "VLMPORT_WEB_PICTURES": str(EXAMPLES),
            "VLMPORT_WEB_KINDS": str(kinds[0].parent),
            "VLMPORT_WEB_EXPECTED": str(file),
        }

    return made


@pytest.fixture(scope="session")
def environment(
    environment_of: Environment, bundle: Bundle, tiles: Bundle, kinds: list[Path]
) -> dict[str, str]:
    """The same for tests of captions."""
    return environment_of({"tiles": tiles}, expectations(bundle, tiles, kinds))
