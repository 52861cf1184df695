"""The memory that pictures take, and what happens where there is too little."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from tests.runtime import toy
from vlmport.errors import DeviceError, ImageError
from vlmport.runtime.graphs.components import DECODER, VISION, out_of_memory
from vlmport.runtime.images import reading
from vlmport.runtime.images.memory import available_memory
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.model import VLM, Caption

SIDE = 3000
MEASURE = """
import sys
import zlib
from vlmport.runtime.images.reading import open_image

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

open_image(sys.argv[1])  # a small one, for what is made once
open("/proc/self/clear_refs", "w").write("5")
before = peak()
pixels = open_image(sys.argv[2])
print((peak() - before) / (pixels.size // 3))
"""


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def solid(name: str) -> tuple[Image.Image, dict[str, Any]]:
    """A large image, and how it is saved."""
    size, turned = (SIDE, SIDE), Image.Exif()
    turned[0x0112] = 6
    rgb = Image.new("RGB", size, (9, 99, 200))
    return {
        "rgb.png": (rgb, {}),
        "rgba.png": (Image.new("RGBA", size, (9, 99, 200, 50)), {}),
        "turned.jpg": (rgb, {"exif": turned}),
        "palette.gif": (Image.new("P", size, 9), {"transparency": 3}),
        "float.tif": (Image.new("F", size, 0.5), {}),
    }[name]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process's peak")
@pytest.mark.parametrize("name", ["rgb.png", "rgba.png", "turned.jpg", "palette.gif", "float.tif"])
def test_a_picture_takes_six_bytes_a_pixel(tmp_path: Path, name: str):
    """At the peak, its 3 bytes a pixel included; 6 MB for bands and decoders come on top."""
    image, options = solid(name)
    small = saved(tmp_path / f"small-{name}", image.resize((40, 30)), **options)
    large = saved(tmp_path / name, image, **options)
    command = [sys.executable, "-c", MEASURE, small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) <= 6 + 6e6 / SIDE**2


MODES = ["RGB", "RGBA", "LA", "CMYK", "P", "L", "1", "I;16"]


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", MODES)
def test_bands_and_turns_change_no_pixel(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
):
    """Against Pillow's own functions on the whole picture."""
    noise = np.random.default_rng(3).integers(0, 256, (13, 9, 4), np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert("RGB").convert(mode) if mode != "RGBA" else image
        if mode == "LA":
            image.putalpha(Image.fromarray(noise[..., 3]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    form = "TIFF" if mode == "CMYK" else "PNG"
    image.save(file, form, exif=exif)
    turned = ImageOps.exif_transpose(Image.open(file))
    if mode == "I;16":
        want = np.repeat((np.asarray(turned) // 257)[..., None], 3, 2)
    else:
        rgba = turned.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        want = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    for band in (1, 20, 1 << 18):
        monkeypatch.setattr("vlmport.runtime.images.pixels.BAND", band)
        np.testing.assert_array_equal(open_image(file.getvalue()), want)
        with Image.open(file) as theirs:
            np.testing.assert_array_equal(open_image(theirs), want)
            theirs.load()  # it is left as it was
            assert theirs.getpixel((0, 0)) is not None


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_is_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "SMALL", 0)
    monkeypatch.setattr(reading, "available_memory", lambda: 50_000)
    with pytest.raises(ImageError, match="100x90") as caught:
        open_image(png(100, 90))
    assert caught.value.code == "image.out-of-memory"
    assert open_image(png(70, 100)).shape == (100, 70, 3)
    monkeypatch.setattr(reading, "available_memory", lambda: None)  # nobody knows
    assert open_image(png(100, 90)).shape == (90, 100, 3)


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is too small for pictures of 40 pixels and more in a row."""
    load = ImageFile.ImageFile.load

    def load_or_fail(self: ImageFile.ImageFile) -> object:
        if self.size[0] >= 40:
            raise MemoryError
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_or_fail)


def test_an_array_that_there_is_no_memory_for(monkeypatch: pytest.MonkeyPatch):
    def repeat(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "repeat", repeat)
    with pytest.raises(ImageError) as caught:
        open_image(np.zeros((3, 4), np.uint8))
    assert caught.value.code == "image.out-of-memory"


@pytest.mark.usefixtures("scarce")
def test_the_rest_of_a_batch_goes_on(vlm: VLM):
    results = list(vlm.caption_each([png(12, 12), png(40, 8), png(8, 12)], batch_size=2))
    assert [type(one) for one in results] == [Caption, ImageError, Caption]
    assert getattr(results[1], "code", None) == "image.out-of-memory"


@pytest.mark.parametrize("method", ["process_image", "encode_image"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_graphs_that_run_out_of_memory(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
):
    """An error of the picture, in the image processor and in the vision encoder."""
    component = "image_processor" if method == "process_image" else VISION
    session: Callable[[str], Any] = vlm.components.session

    class Failing:
        def __init__(self, inner: Any):
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, names: Any, feeds: dict[str, np.ndarray]) -> Any:
            if len(feeds[next(iter(feeds))]) >= 40:
                raise error
            return self.inner.run(names, feeds)

    def failing(name: str) -> Any:
        return Failing(session(name)) if name == component else session(name)

    monkeypatch.setattr(vlm.components, "session", failing)
    small, large = toy.picture(0, 8, 8), toy.picture(0, 44, 44)
    results = list(vlm.caption_each([small, large, small]))
    assert [type(one) for one in results] == [Caption, ImageError, Caption]
    assert getattr(results[1], "code", None) == "image.out-of-memory"
    with pytest.raises(ImageError):
        vlm.caption(large)


def test_a_prompt_that_runs_out_of_memory_is_no_picture():
    error = out_of_memory(DECODER, RuntimeError("Failed to allocate memory for buffer of size 9"))
    assert (type(error), error.code) == (DeviceError, "device.out-of-memory")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 500 kB\nSwapFree: 100 kB\n"}
CGROUP = "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        (MACHINE, 600 * 1024),
        (
            MACHINE
            | {
                "proc/self/cgroup": "0::/a/b\n",
                CGROUP + "a/b/memory.max": "max\n",
                CGROUP + "a/b/memory.current": "5\n",
                CGROUP + "a/memory.max": "3000\n",
                CGROUP + "a/memory.current": "1000\n",
                CGROUP + "a/memory.stat": "anon 1\ninactive_file 7\n",
            },
            2007,
        ),
        (
            MACHINE
            | {
                "proc/self/cgroup": "12:pids:/x\n4:cpu,memory:/docker/x\n0::/\n",
                CGROUP + "memory/memory.limit_in_bytes": "4000\n",
                CGROUP + "memory/memory.usage_in_bytes": "1000\n",
                CGROUP + "memory/memory.stat": "total_inactive_file 11\n",
            },
            3011,
        ),
        (
            MACHINE
            | {
                "proc/self/cgroup": "4:memory:/\n",
                CGROUP + "memory/memory.limit_in_bytes": "9223372036854771712\n",
                CGROUP + "memory/memory.usage_in_bytes": "1000\n",
            },
            600 * 1024,
        ),
    ],
)
def test_the_memory_there_is(tmp_path: Path, files: dict[str, str], want: int | None):
    assert available_memory(write(tmp_path, files)) == want
    found = available_memory()
    assert found is None or found > 0


def planar_tiff(rgb: np.ndarray) -> bytes:
    """A TIFF that holds one colour after the other, packed."""
    height, width, _ = rgb.shape
    planes = [zlib.compress(rgb[..., color].tobytes()) for color in range(3)]
    tags = [(256, width), (257, height), (258, None), (259, 8), (262, 2), (273, None)]
    tags += [(277, 3), (278, height), (279, None), (284, 2)]
    extra = 8 + 2 + 12 * len(tags) + 4
    places = {258: extra, 273: extra + 6, 279: extra + 18}
    starts = [extra + 30 + sum(map(len, planes[:n])) for n in range(3)]
    entries = b""
    for tag, value in tags:
        kind, count = (4, 3) if tag in (273, 279) else (3, 3 if value is None else 1)
        entries += struct.pack("<HHII", tag, kind, count, places[tag] if value is None else value)
    lists = struct.pack("<3H", 8, 8, 8) + struct.pack("<6I", *starts, *map(len, planes))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + bytes(4) + lists + b"".join(planes)


def test_planes_of_a_tiff_come_together():
    """Its decoder looks at the mode of the memory that it is given."""
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(open_image(planar_tiff(rgb)), rgb)


def test_memory_that_no_decoder_wrote_to_is_no_picture():
    """A PNG without pixels, in which Pillow finds nothing to decode."""
    data = png(9, 7)
    with pytest.raises(ImageError) as caught:
        open_image(data[:33] + data[-12:])
    assert caught.value.code == "image.damaged"
