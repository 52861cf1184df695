"""Read any image as RGB pixels, or raise an error that says why not.

Traps:
- Pillow decodes lazily and may accept half a JPEG: the size is checked before anything is decoded,
  and a truncated file is an error.
- Pillow's settings are global to the process, see `_StrictPillow`.
"""

from __future__ import annotations

import importlib
import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from vlmport.errors import ImageError, cut
from vlmport.runtime.images.kinds import AVIF, HEAD, HEIF, RAW, Kind, kind_of
from vlmport.runtime.images.memory import available_memory
from vlmport.runtime.images.pixels import bytes_needed, decode, loaded
from vlmport.runtime.images.uris import local_source

if TYPE_CHECKING:
    from jaxtyping import UInt8

    ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_536  # beyond it the image processor's integers overflow, and it takes minutes
MAX_STREAM = 4 * MAX_PIXELS  # maximum bytes of a pipe: more than MAX_PIXELS pixels need
CHUNK = 1 << 20
SMALL = 1 << 26  # bytes below which the free memory is not checked

# Only some of Pillow's formats: some readers start other programs (EPS), most are hardly used.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
HEIF_FORMAT = "HEIF"  # read where pillow-heif is installed
DNG_VERSION, NEW_SUBFILE_TYPE, IS_REDUCED = 50706, 254, 1  # tags of TIFF


class _StrictPillow:
    """Replaces Pillow's size limit by ours, and makes truncated files an error.

    Both settings are global in Pillow. They are changed while any thread is inside; the last thread
    to leave restores what the first one found.
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
    """Read an image as RGB: upright (EXIF), transparency on white, the first frame.

    Args:
        source: a path, the bytes of a file, an open binary file (a pipe too), a Pillow image, or
            an array of uint8 [H, W, 3], [H, W, 4] or [H, W].

    Raises ImageError for anything that is not a complete image, for more than MAX_PIXELS pixels,
    and for a side of more than MAX_SIDE.
    """
    try:
        return _rgb(source)
    except MemoryError as error:
        raise _no_memory("the image") from error


def _rgb(source: ImageSource) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _strict_pillow:
            return _pixels(source, "the image")
    if isinstance(source, str | os.PathLike):
        source = local_source(source)
    file, name = _open_source(source)
    try:
        seekable, head = _start(file, name)
        with _strict_pillow:
            return _pixels(_identify(seekable, head, name), name, is_ours=True)
    finally:
        if file is not source:
            file.close()


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype}, expected uint8",
            hint="scale to 0 … 255 and call .astype(numpy.uint8)",
            code="image.wrong-array",
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"an array of shape {list(array.shape)}, expected [H, W, 3], [H, W, 4] or [H, W]",
            hint="put channels last, and give one image at a time",
            code="image.wrong-array",
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    if channels == 3:
        return np.ascontiguousarray(array)
    if channels == 4:
        return loaded(Image.fromarray(array)).rgb()
    return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)


def _open_source(source: str | Path | bytes | BinaryIO) -> tuple[BinaryIO, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), f"{len(source)} bytes"
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "read"):
            raise ImageError(
                f"unsupported image type: {type(source).__name__}",
                hint="give a path, bytes, an open file, a Pillow image or a uint8 array",
                code="image.wrong-type",
            )
        return source, str(getattr(source, "name", "the file"))
    path, name = Path(source), cut(os.fspath(source))
    try:
        if not name:
            raise ImageError(
                "the path of an image is empty", hint="name a file", code="image.not-found"
            )
        if path.is_dir():
            raise ImageError(
                f"{name}: a folder, expected an image",
                hint="give the image files, for example FOLDER/*.png",
                code="image.is-a-folder",
            )
        return path.open("rb"), name
    except FileNotFoundError:
        raise ImageError(
            f"{name}: no such file", hint=_neighbours(path), code="image.not-found"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{name}: {reason}", hint="check that it is readable", code="image.unreadable"
        ) from None


def _start(file: BinaryIO, name: str) -> tuple[BinaryIO, bytes]:
    """Return the file at its start, and its first bytes; a pipe is read into memory."""
    try:
        try:
            file.seek(0)
        except (AttributeError, OSError):  # a pipe
            file = _in_memory(file, name)
        head = file.read(HEAD)
        file.seek(0)
        if not isinstance(head, bytes):
            raise TypeError(f"it gives {type(head).__name__}")
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{name}: can't be read: {reason}",
            hint="open it in binary mode",
            code="image.unreadable",
        ) from error
    return file, head


def _in_memory(file: BinaryIO, name: str) -> BinaryIO:
    copy = io.BytesIO()
    while chunk := file.read(CHUNK):
        copy.write(chunk)
        if copy.tell() > MAX_STREAM:
            raise ImageError(
                f"{name}: more than {MAX_STREAM:,} bytes",
                hint="give one image",
                code="image.too-large",
            )
    copy.seek(0)
    return copy


def _identify(file: BinaryIO, head: bytes, name: str) -> Image.Image:
    """Open an image without decoding it. Raises ImageError for one that can't be used."""
    if not head:
        raise ImageError(f"{name}: empty (0 bytes)", hint="download it again", code="image.empty")
    formats, kind = FORMATS, kind_of(head)
    if kind is RAW:  # Canon's is a TIFF; Pillow would read only its preview
        raise _other_kind(kind, name)
    if kind in (HEIF, AVIF) and _reads_heif():
        formats = (*FORMATS, HEIF_FORMAT)
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        if _is_read(kind, head):
            raise _damaged(name, error) from None
        raise _other_kind(kind, name) from None
    except MemoryError as error:
        raise _no_memory(name) from error
    except Exception as error:  # Pillow's readers raise exceptions of many types on damaged files
        raise _damaged(name, error) from error
    if _is_raw(image):
        raise _other_kind(RAW, name)
    _check_size(*image.size, name)
    return image


def _other_kind(kind: Kind, name: str) -> ImageError:
    return ImageError(f"{name}: {kind.what}", hint=kind.hint, code=kind.code)


def _reads_heif() -> bool:
    """Whether Pillow reads HEIC; pillow-heif is registered if it is installed."""
    if HEIF_FORMAT not in Image.OPEN:
        try:
            register: Any = importlib.import_module("pillow_heif")
            register.register_heif_opener()
        except (ImportError, AttributeError):
            return False
    return HEIF_FORMAT in Image.OPEN


def _is_read(kind: Kind, head: bytes) -> bool:
    """Whether a file that Pillow can't open has the signature of a format that it reads."""
    if kind is AVIF:
        return bool(features.check("avif"))
    if kind is HEIF:
        return HEIF_FORMAT in Image.OPEN
    return head.startswith(SIGNATURES)


def _is_raw(image: Image.Image) -> bool:
    """Whether a TIFF is a camera's raw file; Pillow would read only its small preview."""
    tags = getattr(image, "tag_v2", {})
    return DNG_VERSION in tags or bool(_number(tags.get(NEW_SUBFILE_TYPE)) & IS_REDUCED)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _pixels(image: Image.Image, name: str, *, is_ours: bool = False) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image, turn it upright, and convert it to RGB.

    Args:
        is_ours: whether nobody else uses the image, so that it may be destroyed.
    """
    _check_size(*image.size, name)
    needed = bytes_needed(image)
    if needed > SMALL and (free := available_memory()) is not None and needed > free:
        raise _no_memory(name, image.size, needed, free)
    mode, size = image.mode, image.size
    try:
        decoded = decode(image) if is_ours else loaded(image)
    except MemoryError as error:
        raise _no_memory(name, size) from error
    except Exception as error:  # Pillow's readers raise exceptions of many types on damaged files
        raise _damaged(name, error) from error
    try:
        return decoded.rgb()
    except MemoryError as error:
        raise _no_memory(name, size) from error
    except (ValueError, TypeError) as error:
        raise ImageError(
            f"{name}: pixels of mode {mode} are not supported",
            hint="save it as PNG",
            code="image.unsupported-mode",
        ) from error


def _no_memory(
    name: str,
    size: tuple[int, int] | None = None,
    needed: int | None = None,
    free: int | None = None,
) -> ImageError:
    what = "" if size is None else f" for {size[0]}x{size[1]} pixels"
    if needed is not None and free is not None:
        what += f": about {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"
    return ImageError(
        f"{name}: not enough memory{what}",
        hint="scale the image down, or free memory",
        code="image.out-of-memory",
    )


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(
            f"{name}: {width}x{height} pixels",
            hint="give an image with at least one pixel",
            code="image.empty",
        )
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width}x{height} is {width * height:,} pixels, the maximum is {MAX_PIXELS:,}",
            hint="scale the image down first",
            code="image.too-large",
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: {width}x{height} pixels, the maximum of a side is {MAX_SIDE:,}",
            hint="cut the image into pieces, or scale it down first",
            code="image.too-large",
        )


def _damaged(name: str, error: Exception) -> ImageError:
    detail = str(error).split("\n")[0][:200]
    if isinstance(error, UnidentifiedImageError):  # its message is an object's address
        detail = "no reader can decode it"
    return ImageError(
        f"{name}: damaged or truncated: {detail}",
        hint="download or copy it again",
        code="image.damaged",
    )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {cut(str(path.parent))} does not exist either"
    return "check the path; relative paths start at the current folder"
