"""Recognize files that are not read: other image formats, and files that are not images.

The image formats named here are common but not supported, so that the error can name the format and
what to do.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 512  # number of first bytes that are looked at: an SVG drawing may begin with a comment
HINT_FORMATS = "supported: PNG, JPEG, WebP, AVIF, GIF, BMP and TIFF"
HINT_SAVE = f"save it as PNG or JPEG; {HINT_FORMATS}"
HINT_RAW = "develop it: save it as JPEG, PNG or TIFF"
HINT_VIDEO = "give some of its frames as images"
HINT_HEIF = "pip install pillow-heif, or save it as JPEG"
HINT_AVIF = "install a Pillow with AVIF (pillow>=12 from PyPI has it), or save it as PNG"
HINT_DRAW = "convert it to PNG, at the size that you need"
HINT_PAGE = "convert a page of it to PNG"


@dataclass(frozen=True)
class Kind:
    """A kind of file, with the error code and the hint for it."""

    what: str
    hint: str
    code: str


def _image(name: str, hint: str = HINT_SAVE) -> Kind:
    return Kind(f"{name}, a format that is not supported", hint, code="image.unsupported-format")


def _other(what: str, hint: str = HINT_FORMATS) -> Kind:
    return Kind(f"not an image but {what}", hint, code="image.not-a-picture")


HEIF = _image("a HEIC (HEIF) image", HINT_HEIF)
AVIF = _image("an AVIF image", HINT_AVIF)
VIDEO = _other("a video (MP4 or MOV)", HINT_VIDEO)
RAW = _image("a camera raw file", HINT_RAW)
SVG = _image("an SVG drawing", HINT_DRAW)

# Brand after `ftyp` → kind; any other brand is a video.
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm"), HEIF),
    **dict.fromkeys((b"mif1", b"msf1", b"mif2"), HEIF),
    b"crx ": RAW,
    b"jxl ": _image("a JPEG XL image"),
    **dict.fromkeys((b"jp2 ", b"jpx ", b"jph "), _image("a JPEG 2000 image")),
    **dict.fromkeys((b"M4A ", b"M4B ", b"F4A ", b"F4B "), _other("sound (M4A or the like)")),
}

# First bytes of a file → kind. The first match counts.
BEGINNINGS = {
    b"%pdf": _image("a PDF", HINT_PAGE),
    b"8bps": _image("a Photoshop file (PSD)"),
    b"8bpb": _image("a Photoshop file (PSB)"),
    b"\xff\x0a": _image("a JPEG XL image"),
    b"\0\0\0\x0cjxl ": _image("a JPEG XL image"),
    b"\0\0\0\x0cjp  ": _image("a JPEG 2000 image"),
    b"\xff\x4f\xff\x51": _image("a JPEG 2000 image"),
    b"ii\xbc": _image("a JPEG XR image"),
    b"ii*\0\x10\0\0\0cr": RAW,  # Canon CR2
    b"fujifilmccd-raw": RAW,
    **dict.fromkeys((b"iiro", b"iirs", b"mmor", b"iiu\0", b"fovb", b"\0mrm"), RAW),
    b"%!ps": _image("a PostScript file (EPS)", HINT_PAGE),
    b"\xc5\xd0\xd3\xc6": _image("a PostScript file (EPS)", HINT_PAGE),
    b"\xd7\xcd\xc6\x9a": _image("a Windows metafile (WMF)", HINT_DRAW),
    b"gimp xcf": _image("a GIMP file (XCF)"),
    b"v/1\x01": _image("an OpenEXR image"),
    b"#?radiance": _image("a Radiance image (HDR)"),
    b"#?rgbe": _image("a Radiance image (HDR)"),
    b"dds ": _image("a DirectDraw texture (DDS)"),
    b"\xabktx ": _image("a texture (KTX)"),
    b"qoif": _image("a QOI image"),
    b"flif": _image("a FLIF image"),
    b"bpg\xfb": _image("a BPG image"),
    b"icns": _image("an icon of macOS (ICNS)"),
    b"\0\0\1\0": _image("an icon (ICO)"),
    b"\0\0\2\0\0\0\0\0": _image("a Targa image (TGA)"),
    b"\0\0\x0a\0\0\0\0\0": _image("a Targa image (TGA)"),
    b"\0\0\2\0": _image("a mouse pointer (CUR)"),
    b"\x8amng": _image("an MNG animation"),
    b"\x8bjng": _image("a JNG image"),
    b"at&tform": _image("a DjVu document", HINT_PAGE),
    b"simple  =": _image("a FITS image"),
    b"\x01\xda": _image("an SGI image"),
    b"/* xpm": _image("an XPM image"),
    **{
        b"p%d%s" % (number, space): _image("a Netpbm image (PBM, PGM, PPM or PAM)")
        for number in range(1, 8)
        for space in (b"\n", b"\r", b" ", b"\t", b"#")
    },
    b"pf\n": _image("a PFM image"),
    b"pk\x03\x04": _other("a ZIP archive or an Office file"),
    b"<svg": SVG,
    b"<!doctype svg": SVG,
    b"<!doctype": _other("a web page"),
    b"<html": _other("a web page"),
    b"<?xml": _other("XML"),
    b"{": _other("JSON"),
    b"\x1f\x8b": _other("a gzip archive"),
    b"version https://git-lfs": _other(
        "a Git LFS pointer: its file was not fetched", "git lfs pull"
    ),
    b"\x1a\x45\xdf\xa3": _other("a video (Matroska or WebM)", HINT_VIDEO),
    b"flv\x01": _other("a video (FLV)", HINT_VIDEO),
    b"\0\0\x01\xba": _other("a video (MPEG)", HINT_VIDEO),
    b"id3": _other("an MP3"),
    b"oggs": _other("an Ogg file"),
    b"flac": _other("sound (FLAC)"),
    b"\x7felf": _other("a program"),
    b"mz": _other("a program"),
}
RIFFS = {b"avi ": _other("a video (AVI)", HINT_VIDEO), b"wave": _other("sound (WAV)")}


def kind_of(head: bytes) -> Kind:
    """Return the kind of a file in an unsupported format, by its first bytes."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], VIDEO)
    if start.startswith(b"riff"):
        return RIFFS.get(start[8:12], _other("a RIFF file"))
    if head[128:132] == b"DICM":
        return _image("a DICOM image")
    if head[40:44] == b" EMF":
        return _image("a Windows metafile (EMF)", HINT_DRAW)
    if start.startswith((b"<?xml", b"<!--")) and b"<svg" in start:
        return SVG
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning.lower()):
            return kind
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return _other("text")
    return Kind(f"not an image (begins {head[:8]!r})", HINT_FORMATS, code="image.not-a-picture")
