"""The golden files are what the code does, and another language can equal them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.decoding import golden
from tests.decoding.golden import GOLDEN

HERE = Path(__file__).parent


def test_files_are_up_to_date():
    assert golden.check() == []


def test_a_changed_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One token, one score and one missing file: each is named."""
    monkeypatch.setattr(golden, "contents", lambda: {name: read(GOLDEN, name) for name in names()})
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    assert golden.check(tmp_path) == []

    greedy = read(tmp_path, "greedy")
    greedy["cases"][0]["results"][0]["tokens"][1] += 1
    (tmp_path / "greedy.json").write_text(json.dumps(greedy), encoding="utf-8")
    beams = read(tmp_path, "beams")
    beams["cases"][2]["results"][1]["score"] += 1e-4
    (tmp_path / "beams.json").write_text(json.dumps(beams), encoding="utf-8")
    (tmp_path / "random.json").unlink()
    assert golden.check(tmp_path) == [
        "beams.json.cases[2].results[1].score",
        "greedy.json.cases[0].results[0].tokens[1]",
        "random.json",
    ]


def test_files_are_small_and_every_mode_ends_in_every_way():
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 1_000_000
    for name in ("greedy", "sampling", "beams", "beam_sampling"):
        cases = read(GOLDEN, name)["cases"]
        ended = {one["stop_reason"] for case in cases for one in case["results"]}
        assert ended == {"stop", "length"}, name
        assert len({case["name"] for case in cases}) == len(cases) >= 20


def test_the_stream_in_javascript():
    """Written from docs/decoding.md alone, it draws the same."""
    node = shutil.which("node")
    if node is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("node is not on PATH: install Node.js 20 or newer (nodejs.org)")
    file = (GOLDEN / "random.json").read_text(encoding="utf-8")
    command = [node, str(HERE / "stream.mjs")]
    done = subprocess.run(command, input=file, capture_output=True, text=True, check=True)
    *different, compared = done.stdout.splitlines()
    assert different == []
    assert json.loads(compared) == {"words": 80, "uniform": 21, "draws": 84}
    broken = file.replace("11520", "11521", 1)
    done = subprocess.run(command, input=broken, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("words: [11520,0,")


def names() -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
