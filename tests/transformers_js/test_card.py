"""Every block of code in a model card runs as it is written there, for every family and layout.

That for the browser is run by web/browser/api.test.ts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.transformers_js.test_transformers_js import HERE, client
from vlmport import cli
from vlmport.bundle import CARD, Bundle
from vlmport.bundle.layouts import COMPONENTS, FUSED, GENAI
from vlmport.exporter import export

ROOT = HERE.parents[1]
LOCAL = """\
import {{ env }} from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = '{parent}/';
"""
# The answers of the trained models about this picture.
PICTURE = ROOT / "examples/red_square.png"
SAID = re.compile(r"a red square on a white background\.?", re.IGNORECASE)
TRAINED = ("shapes", "shapes-smolvlm")
RANDOM = {"idefics3": write_idefics3_checkpoint, "qwen2.5": write_qwen2_5, "qwen3": write_qwen3}
LAYOUTS = {
    COMPONENTS: write_prefix_checkpoint,
    FUSED: write_qwen3,
    GENAI: write_qwen2_5,
}

__all__ = ["client"]  # the fixture, which installs the package


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One of each family, all in one folder under their names."""
    folder = tmp_path_factory.mktemp("cards")
    found = {name: export(name, folder / name, precisions="q4") for name in TRAINED}
    for name, write in RANDOM.items():
        source = write(folder / "sources" / name)
        settings = json.loads((source / "generation_config.json").read_text())
        write_json(source / "generation_config.json", {**settings, "max_new_tokens": 4})
        found[name] = export(source, folder / name, precisions="q8")
    return found


def blocks(bundle: Bundle) -> list[tuple[str, str]]:
    """Language and code of each block."""
    card = (bundle.folder / CARD).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def code(bundle: Bundle, language: str, package: str = "") -> str:
    """The one block in this language that names the package, its model and picture filled in."""
    (found,) = [text for kind, text in blocks(bundle) if kind == language and package in text]
    return found.replace("MODEL", str(bundle.folder)).replace("photo.jpg", str(PICTURE))


def assert_said(name: str, text: str) -> None:
    assert name in RANDOM or SAID.fullmatch(text.strip()), (name, text)


def test_the_blocks_are_those_that_are_run(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        assert [kind for kind, _ in blocks(bundle)] == ["sh", "python", "js", "js"]


def test_the_code_for_python_captions(bundles: dict[str, Bundle]) -> None:
    for name, bundle in bundles.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code(bundle, "python"), {})
        assert_said(name, out.getvalue())


def test_the_commands_caption(bundles: dict[str, Bundle]) -> None:
    for name, bundle in bundles.items():
        for line in code(bundle, "sh").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "vlmport"
            done = CliRunner().invoke(cli.app, arguments)
            assert done.exit_code == 0, done.output
            assert_said(name, done.stdout)


@pytest.mark.usefixtures("client")
def test_the_code_for_transformers_js_captions(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """The pictures came first in all cards, which one of its processors takes so: it threw."""
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    for name, bundle in bundles.items():
        text = code(bundle, "js", "@huggingface/transformers").replace(str(bundle.folder), name)
        local = LOCAL.format(parent=bundle.folder.parent)
        (tmp_path / f"{name}.mjs").write_text(local + text, encoding="utf-8")
    imports = "".join(f"await import('./{name}.mjs');\n" for name in bundles)
    (tmp_path / "all.mjs").write_text(imports, encoding="utf-8")
    node = shutil.which("node")
    assert node is not None
    done = subprocess.run(
        [node, "all.mjs"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # a random one may say a line or several
    assert len(lines) >= len(bundles)
    for name, text in zip(TRAINED, lines, strict=False):
        assert_said(name, text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_other_programs_shows_its_graphs(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path / "source")
    size = {"image_size": "80x64"} if layout == FUSED else {}
    bundle = export(source, tmp_path / "bundle", precisions="fp32", layout=layout, **size)
    assert blocks(bundle) == []
    assert "`vlmport inspect .`" in (bundle.folder / CARD).read_text(encoding="utf-8")
    before = Path.cwd()
    os.chdir(bundle.folder)
    try:
        done = CliRunner().invoke(cli.app, ["inspect", "."])
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
