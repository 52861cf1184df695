"""Any picture as RGB pixels, or a plain reason why not.

Traps:
- Pillow decodes lazily and is content with half a JPEG: the size is checked before anything is
  decoded, and a truncated file is refused.
- Pillow's `convert("RGB")` clips 16-bit gray and drops transparency: both are dealt with here.
- Pillow's settings are global to the process, see `_StrictPillow`.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vlmport.errors import ImageError

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_536  # up to here the image processor's integers hold; past it, it takes minutes too
MAX_STREAM = 4 * MAX_PIXELS  # bytes of a pipe: more than any picture of so many pixels needs
CHUNK = 1 << 20
BAND = 64  # rows of gray that are converted at a time: in float64 they take eight bytes a pixel

# Not all that Pillow knows: some of its readers start other programs (EPS), most are hardly used.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
HINT_FORMATS = "PNG, JPEG, WebP, AVIF, GIF, BMP and TIFF are read"
HINT_VIDEO = "give some of its frames as pictures"

# What a file that is no picture begins with → what it is.
LOOKS_LIKE = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive or an Office file",
    b"<svg": "an SVG drawing",
    b"<?xml": "XML, perhaps an SVG drawing",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"{": "JSON",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer: its file was not fetched",
    b"\x1aE\xdf\xa3": "a video (Matroska or WebM)",
    b"RIFF": "a RIFF file (AVI or WAV?)",
    b"ID3": "an MP3",
    b"OggS": "an Ogg file",
    b"\x7fELF": "a program",
    b"MZ": "a program",
}
# What stands after `ftyp` in pictures and in sound; anything else there is a video.
PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"mif1", b"msf1")
SOUND_BRANDS = (b"M4A ", b"M4B ", b"F4A ", b"F4B ")


class _StrictPillow:
    """Our own size limit in place of Pillow's, and a truncated file is an error.

    Pillow keeps both settings in its modules. They are ours while any thread is in here; the
    last one to leave puts back what the first one found.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._found: tuple[int | None, bool] = (None, False)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._found = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self._found


_strict_pillow = _StrictPillow()


def open_image(source: ImageSource) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture as RGB, upright (EXIF), transparency laid on white, the first frame.

    Args:
        source: a path, the bytes of a file, an open binary file (a pipe too), a Pillow image, or
            an array of uint8 [H, W, 3], [H, W, 4] or [H, W].

    Raises ImageError for whatever is no whole picture, for more than MAX_PIXELS pixels, and for
    more than MAX_SIDE in a row or a column.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _strict_pillow:
            return _pixels(source, "the image")
    file, name = _open_source(source)
    try:
        seekable, head = _start(file, name)
        with _strict_pillow:
            return _pixels(_identify(seekable, head, name), name)
    finally:
        if file is not source:
            file.close()


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype}, expected uint8",
            hint="scale to 0 … 255 and call .astype(numpy.uint8)",
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"an array of shape {list(array.shape)}, expected [H, W, 3], [H, W, 4] or [H, W]",
            hint="channels come last; one picture at a time",
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    if channels == 3:
        return np.ascontiguousarray(array)
    if channels == 4:
        return _on_white(Image.fromarray(array))
    return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)


def _open_source(source: str | Path | bytes | BinaryIO) -> tuple[BinaryIO, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), f"{len(source)} bytes"
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "read"):
            raise ImageError(
                f"a picture can't be a {type(source).__name__}",
                hint="a path, bytes, an open file, a Pillow image or a uint8 array",
            )
        return source, str(getattr(source, "name", "the file"))
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        raise ImageError(f"{name}: a URL is not fetched", hint="download it and give its path")
    path = Path(name)
    try:
        if path.is_dir():
            raise ImageError(f"{name}: a folder", hint="name a picture in it")
        return path.open("rb"), name
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file", hint=_neighbours(path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name}: {reason}", hint="is it readable?") from error


def _start(file: BinaryIO, name: str) -> tuple[BinaryIO, bytes]:
    """The file from its start, in memory where it can't go back there, and its first bytes."""
    try:
        try:
            file.seek(0)
        except (AttributeError, OSError):  # a pipe
            file = _in_memory(file, name)
        head = file.read(64)
        file.seek(0)
        if not isinstance(head, bytes):
            raise TypeError(f"it gives {type(head).__name__}")
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{name}: can't be read: {reason}", hint="is it open, and in binary mode?"
        ) from error
    return file, head


def _in_memory(file: BinaryIO, name: str) -> BinaryIO:
    copy = io.BytesIO()
    while chunk := file.read(CHUNK):
        copy.write(chunk)
        if copy.tell() > MAX_STREAM:
            raise ImageError(
                f"{name}: more than {MAX_STREAM // 1_000_000} MB", hint="is it one picture?"
            )
    copy.seek(0)
    return copy


def _identify(file: BinaryIO, head: bytes, name: str) -> Image.Image:
    """Open without decoding, and refuse what is empty, no picture, or too large."""
    if not head:
        raise ImageError(f"{name}: empty (0 bytes)", hint="was it downloaded whole?")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        what = _looks_like(head)
        hint = HINT_VIDEO if "a video" in what else HINT_FORMATS
        raise ImageError(f"{name}: {what}", hint=hint) from None
    except Exception as error:  # Pillow's readers raise all kinds on damaged files
        raise _damaged(name, error) from error
    _check_size(*image.size, name)
    return image


def _pixels(image: Image.Image, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """Decode, turn upright, convert."""
    _check_size(*image.size, name)
    try:
        image = ImageOps.exif_transpose(image)
        image.load()
    except Exception as error:  # Pillow's readers raise all kinds on damaged files
        raise _damaged(name, error) from error
    try:
        if image.mode.startswith("I") or image.mode == "F":
            return _from_gray(image)
        if image.has_transparency_data or image.mode == "RGBa":
            return _on_white(image)
        return np.array(image.convert("RGB"))
    except (ValueError, TypeError) as error:
        raise ImageError(
            f"{name}: pixels of mode {image.mode} are not supported", hint="save it as PNG"
        ) from error


def _on_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Lay a picture with transparency on white."""
    if image.mode == "La":  # Pillow turns it into LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _from_gray(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """16-bit, 32-bit and float gray as 8 bits.

    16 bits are scaled (65535 becomes 255). 32-bit and float have no fixed white: values within
    0 … 255 (floats within 0 … 1 too) are taken as such, others are stretched to their own range.
    A gray that the file declares transparent is white.
    """
    stored = np.asarray(image)
    bands = [stored[at : at + BAND] for at in range(0, len(stored), BAND)]
    low = min(float(_finite(band).min()) for band in bands)
    high = max(float(_finite(band).max()) for band in bands)
    black, factor, divisor = 0.0, 1.0, 1.0
    if image.mode.startswith("I;16"):
        divisor = 257.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        factor = 255.0
    elif image.mode == "I" and low >= 0 and 255 < high <= 65535:
        divisor = 257.0  # what Pillow makes of some 16-bit files
    elif low < 0 or high > 255:
        black, factor, divisor = low, 255.0, (high - low) or 1.0
    gray = np.empty(stored.shape, np.uint8)
    for band, result in zip(bands, np.split(gray, range(BAND, len(gray), BAND)), strict=True):
        result[...] = np.clip(np.rint((_finite(band) - black) * factor / divisor), 0, 255)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[stored == transparent] = 255
    return np.repeat(gray[:, :, None], 3, axis=2)


def _finite(values: np.ndarray) -> Float[np.ndarray, "h W"]:
    """float64 copies, with 0 for what is no number."""
    return np.nan_to_num(values.astype(np.float64), copy=False, posinf=0.0, neginf=0.0)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}x{height} pixels", hint="a picture needs pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width}x{height} is {width * height / 1e6:.0f} million pixels, the limit is "
            f"{MAX_PIXELS // 1_000_000} million",
            hint="scale it down first",
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: {width}x{height} pixels, the limit is {MAX_SIDE} a side",
            hint="cut it into pieces, or scale it down first",
        )


def _damaged(name: str, error: Exception) -> ImageError:
    detail = str(error).split("\n")[0]
    return ImageError(f"{name}: damaged or truncated: {detail}", hint="download or copy it again")


def _looks_like(head: bytes) -> str:
    for start, what in LOOKS_LIKE.items():
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(start.lower()):
            return f"not a picture but {what}"
    if head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS:
        return "a HEIC or AVIF picture that this Pillow can't read"
    if head[4:8] == b"ftyp" and head[8:12] in SOUND_BRANDS:
        return "not a picture but sound (M4A or the like)"
    if head[4:8] == b"ftyp":
        return "not a picture but a video (MP4 or MOV)"
    printable = all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)
    return "not a picture but text" if printable else f"not a picture (begins {head[:8]!r})"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    return "check the path; relative paths start at the current folder"
