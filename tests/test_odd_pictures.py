"""`vlmport caption` on pictures that come by a pipe, and on odd ones that can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmport.runtime.images.reading import open_image
from vlmport.runtime.model import VLM


def caption(picture: object, bundle: Path, **options: Any) -> str:
    """What it prints, in a process of its own, which must print no more than that."""
    command = [sys.executable, "-m", "vlmport", "caption", str(picture), "-m", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_picture_by_a_pipe(tiny_bundle: Path, tmp_path: Path) -> None:
    """`cat a.png | vlmport caption /dev/stdin`, and `vlmport caption <(cat a.png)`"""
    path = tmp_path / "a.png"
    Image.radial_gradient("L").save(path)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
        printed = caption("/dev/stdin", tiny_bundle, stdin=cat.stdout)
    with VLM.open(tiny_bundle) as vlm:
        assert printed == f"{vlm.caption(path).text}\n"


def test_what_pillow_warns_of_is_not_shown(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x05"  # says that it has 5 entries, and has none
    Image.new("RGB", (40, 30)).save(path, exif=broken)
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        open_image(path)
    assert caption(path, tiny_bundle)
