"""What is in a folder, and what a bundle gives for a picture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from vlmport.runtime.graphs.components import Components, merge_image_features


def contents(folder: Path) -> dict[str, str]:
    """Path → SHA-256 of every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def graphs(folder: Path) -> dict[str, str]:
    """The same of the graphs alone."""
    return {name: digest for name, digest in contents(folder).items() if name.startswith("onnx/")}


def first_logits(bundle: Path, precision: str = "fp32") -> np.ndarray:
    """Logits f32[T, V] of a drawn picture."""
    components = Components.open(bundle, precision=precision, threads=1)
    y, x = np.mgrid[:40, :52]
    picture = np.stack([x * 4, y * 6, (x * y) % 256], axis=-1).astype(np.uint8)
    processed = components.process_image(picture)
    ids = processed.prompt_ids
    features = components.encode_image(processed.inputs)
    token = components.manifest.prompt.image_token_id
    embeds = merge_image_features(components.embed(ids[None])[0], ids, features, token)
    ones, positions = np.ones((1, len(ids)), np.int64), components.position_ids(ids).ids[None]
    logits, _ = components.decode(embeds[None], ones, positions)
    return logits[0]
