"""The valid folders that fuzzing damages; each is made when it is first asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import write_prefix_checkpoint
from tests.exporter.test_same_model import write_adapter
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.bundle.layouts import COMPONENTS, FUSED, GENAI, HUB
from vlmport.exporter import export

SIDE_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "do_resize": True,
        "size": {"height": 30, "width": 30},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "generation_config.json": {
        "eos_token_id": [0, 5],
        "pad_token_id": 0,
        "max_new_tokens": 12,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [8, 9]],
        "suppress_tokens": [1, 2],
        "temperature": 0.7,
    },
}


def write_captioner(folder: Path) -> None:
    write_prefix_checkpoint(folder)
    for name, text in SIDE_FILES.items():
        (folder / name).write_text(json.dumps(text), encoding="utf-8")


CAPTIONER = "captioner"
WRITERS: dict[str, Callable[[Path], object]] = {
    CAPTIONER: write_captioner,
    "shards": functools.partial(write_prefix_checkpoint, shards=2),
    "idefics3": functools.partial(write_idefics3_checkpoint, spelling="v4"),
    "qwen2.5": functools.partial(write_qwen2_5, spelling="v4"),
    "qwen3": functools.partial(write_qwen3, spelling="v5"),
}
# Layout → a checkpoint that has it, and the size of its pictures where they are of one.
LAYOUTS: dict[str, tuple[str, str | None]] = {
    HUB: (CAPTIONER, None),
    COMPONENTS: (CAPTIONER, None),
    FUSED: ("qwen3", "80x64"),
    GENAI: ("qwen2.5", None),
}


@dataclass(frozen=True)
class Workshop:
    """Valid folders to start from, and room to write."""

    folder: Path

    def checkpoint(self, kind: str = CAPTIONER) -> Path:
        """Of WRITERS."""
        folder = self.folder / kind
        if not folder.exists():
            WRITERS[kind](folder)
        return folder

    @functools.cached_property
    def adapter(self) -> Path:
        """Of the captioner."""
        folder = self.folder / "adapter"
        write_adapter(folder, self.checkpoint())
        return folder

    def bundle(self, layout: str = HUB) -> Path:
        """Of LAYOUTS, in fp32."""
        folder = self.folder / f"bundle, {layout}"
        if not folder.exists():
            kind, size = LAYOUTS[layout]
            checkpoint = self.checkpoint(kind)
            export(checkpoint, folder, precisions="fp32", layout=layout, image_size=size)
        return folder

    @contextlib.contextmanager
    def altered(self, original: Path, name: str, data: bytes) -> Iterator[Path]:
        """A copy of a folder, by links, in which one file has these bytes."""
        copied = self.folder / "altered"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(original, copied, copy_function=_link)
        (copied / name).unlink(missing_ok=True)
        (copied / name).write_bytes(data)
        yield copied


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
