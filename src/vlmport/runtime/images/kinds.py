"""What a file is that no reader takes: another picture format, or no picture at all.

Every picture format that is named here is one that people have and that is not read, so that the
error can say its name and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 512  # bytes that are looked at: an SVG drawing may begin with a comment
HINT_FORMATS = "PNG, JPEG, WebP, AVIF, GIF, BMP and TIFF are read"
HINT_SAVE = f"save it as PNG or JPEG: {HINT_FORMATS}"
HINT_RAW = "develop it: save it as JPEG, PNG or TIFF"
HINT_VIDEO = "give some of its frames as pictures"
HINT_HEIF = "pip install pillow-heif, or save it as JPEG"
HINT_AVIF = "install a Pillow with AVIF (pillow>=12 from PyPI has it), or save it as PNG"
HINT_DRAW = "draw it at the size that you need: save it as PNG"
HINT_PAGE = "save a page of it as PNG"


@dataclass(frozen=True)
class Kind:
    """A kind of file, with the error code and the hint for it."""

    what: str
    hint: str
    code: str


def _picture(name: str, hint: str = HINT_SAVE) -> Kind:
    return Kind(f"{name}, which is not read", hint, code="image.unsupported-format")


def _other(what: str, hint: str = HINT_FORMATS) -> Kind:
    return Kind(f"not a picture but {what}", hint, code="image.not-a-picture")


HEIF = _picture("a HEIC (HEIF) picture", HINT_HEIF)
AVIF = _picture("an AVIF picture", HINT_AVIF)
VIDEO = _other("a video (MP4 or MOV)", HINT_VIDEO)
RAW = _picture("a camera raw file", HINT_RAW)
SVG = _picture("an SVG drawing", HINT_DRAW)

# What stands after `ftyp` → what it is; anything else there is a video.
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm"), HEIF),
    **dict.fromkeys((b"mif1", b"msf1", b"mif2"), HEIF),
    b"crx ": RAW,
    b"jxl ": _picture("a JPEG XL picture"),
    **dict.fromkeys((b"jp2 ", b"jpx ", b"jph "), _picture("a JPEG 2000 picture")),
    **dict.fromkeys((b"M4A ", b"M4B ", b"F4A ", b"F4B "), _other("sound (M4A or the like)")),
}

# What a file begins with → what it is. The first that fits counts.
BEGINNINGS = {
    b"%pdf": _picture("a PDF", HINT_PAGE),
    b"8bps": _picture("a Photoshop file (PSD)"),
    b"8bpb": _picture("a Photoshop file (PSB)"),
    b"\xff\x0a": _picture("a JPEG XL picture"),
    b"\0\0\0\x0cjxl ": _picture("a JPEG XL picture"),
    b"\0\0\0\x0cjp  ": _picture("a JPEG 2000 picture"),
    b"\xff\x4f\xff\x51": _picture("a JPEG 2000 picture"),
    b"ii\xbc": _picture("a JPEG XR picture"),
    b"ii*\0\x10\0\0\0cr": RAW,  # Canon CR2
    b"fujifilmccd-raw": RAW,
    **dict.fromkeys((b"iiro", b"iirs", b"mmor", b"iiu\0", b"fovb", b"\0mrm"), RAW),
    b"%!ps": _picture("a PostScript file (EPS)", HINT_PAGE),
    b"\xc5\xd0\xd3\xc6": _picture("a PostScript file (EPS)", HINT_PAGE),
    b"\xd7\xcd\xc6\x9a": _picture("a Windows metafile (WMF)", HINT_DRAW),
    b"gimp xcf": _picture("a GIMP file (XCF)"),
    b"v/1\x01": _picture("an OpenEXR picture"),
    b"#?radiance": _picture("a Radiance picture (HDR)"),
    b"#?rgbe": _picture("a Radiance picture (HDR)"),
    b"dds ": _picture("a DirectDraw texture (DDS)"),
    b"\xabktx ": _picture("a texture (KTX)"),
    b"qoif": _picture("a QOI picture"),
    b"flif": _picture("a FLIF picture"),
    b"bpg\xfb": _picture("a BPG picture"),
    b"icns": _picture("an icon of macOS (ICNS)"),
    b"\0\0\1\0": _picture("an icon (ICO)"),
    b"\0\0\2\0\0\0\0\0": _picture("a Targa picture (TGA)"),
    b"\0\0\x0a\0\0\0\0\0": _picture("a Targa picture (TGA)"),
    b"\0\0\2\0": _picture("a mouse pointer (CUR)"),
    b"\x8amng": _picture("an MNG animation"),
    b"\x8bjng": _picture("a JNG picture"),
    b"at&tform": _picture("a DjVu document", HINT_PAGE),
    b"simple  =": _picture("a FITS picture"),
    b"\x01\xda": _picture("an SGI picture"),
    b"/* xpm": _picture("an XPM picture"),
    **{
        b"p%d%s" % (number, space): _picture("a Netpbm picture (PBM, PGM, PPM or PAM)")
        for number in range(1, 8)
        for space in (b"\n", b"\r", b" ", b"\t", b"#")
    },
    b"pf\n": _picture("a PFM picture"),
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
    """The kind of a file that is none of the formats that are read, by its first bytes."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], VIDEO)
    if start.startswith(b"riff"):
        return RIFFS.get(start[8:12], _other("a RIFF file"))
    if head[128:132] == b"DICM":
        return _picture("a DICOM picture")
    if head[40:44] == b" EMF":
        return _picture("a Windows metafile (EMF)", HINT_DRAW)
    if start.startswith((b"<?xml", b"<!--")) and b"<svg" in start:
        return SVG
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning.lower()):
            return kind
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return _other("text")
    return Kind(f"not a picture (begins {head[:8]!r})", HINT_FORMATS, code="image.not-a-picture")
