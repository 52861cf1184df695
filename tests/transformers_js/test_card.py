"""The JavaScript in a model card runs as it is written there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.transformers_js.test_transformers_js import HERE, Client, client
from vlmport.bundle import CARD
from vlmport.export import export

ROOT = HERE.parents[1]
LOCAL = """\
import {{ env }} from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = '{parent}/';
"""

__all__ = ["client"]  # the fixture, which installs the package


def test_the_code_for_transformers_js_captions(client: Client, tmp_path: Path) -> None:
    bundle = export("shapes", tmp_path / "shapes", precisions="q4")
    card = (bundle.folder / CARD).read_text(encoding="utf-8")
    (code,) = [
        block
        for block in re.findall(r"```js\n(.*?)```", card, flags=re.DOTALL)
        if "@huggingface/transformers" in block
    ]
    code = code.replace("MODEL", "shapes")
    code = code.replace("photo.jpg", str(ROOT / "examples/red_square.png"))
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    (tmp_path / "card.mjs").write_text(LOCAL.format(parent=tmp_path) + code, encoding="utf-8")
    node = shutil.which("node")
    assert node is not None
    done = subprocess.run(
        [node, "card.mjs"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a red square on a white background\n"
