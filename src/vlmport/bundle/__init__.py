"""Bundles: read, check, choose precisions, write results into them.

Read in this order: `manifest` (what vlmport.json says), `manifest_file` (how it is read and
written), `folder` (`Bundle`: the folder and its manifest), then `precisions` and `layouts`.
"""

from vlmport.bundle.folder import CARD, Bundle, hash_folder, is_bundle
from vlmport.bundle.hashing import CHUNK_BYTES, FileEntry, hash_file
from vlmport.bundle.manifest import (
    CacheLayout,
    Dims,
    GenerationSpec,
    Golden,
    GoldenExpectation,
    GoldenImage,
    Manifest,
    PixelSpec,
    PromptSpec,
    Variant,
)
from vlmport.bundle.manifest_file import MANIFEST, VERSION, read_manifest, write_manifest
from vlmport.bundle.precisions import ANY, DEFAULT_PRECISIONS, SUFFIXES, split_precisions

__all__ = [
    "ANY",
    "CARD",
    "CHUNK_BYTES",
    "DEFAULT_PRECISIONS",
    "MANIFEST",
    "SUFFIXES",
    "VERSION",
    "Bundle",
    "CacheLayout",
    "Dims",
    "FileEntry",
    "GenerationSpec",
    "Golden",
    "GoldenExpectation",
    "GoldenImage",
    "Manifest",
    "PixelSpec",
    "PromptSpec",
    "Variant",
    "hash_file",
    "hash_folder",
    "is_bundle",
    "read_manifest",
    "split_precisions",
    "write_manifest",
]
