"""How large files of weights may be: `--max-shard-size`, as Hugging Face writes sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.errors import raises
from tests.qwen_checkpoints import write_qwen3
from vlmport.errors import ExportError
from vlmport.exporter import export, writing
from vlmport.exporter.writing import parse_size
from vlmport.runtime.model import VLM


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("1.8GiB", 1932735283),
        ("64kb", 64_000),
        ("12", 12),
        (7, 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0.1", "-5MB", "5 parsecs", "1e3", "GB", "5MBs", -1, "9" * 400, "1" * 4400]
)
def test_what_is_no_size(text: str | int) -> None:
    with raises(ExportError, "option.wrong-value", "size", str(text)[:9]) as caught:
        parse_size(text)
    assert "GiB" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["2.1GB", "2GiB", "5GB", 2_000_000_001, "9" * 18])
def test_sizes_that_browsers_do_not_hold(
    tmp_path: Path, tiny_checkpoint: Path, text: str | int
) -> None:
    with raises(ExportError, "option.wrong-value", "2000000000", "(2GB)") as caught:
        export(tiny_checkpoint, tmp_path / "out", max_shard_size=text)
    assert "leave out the size" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_files_are_no_larger_and_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any family; a shard is named as transformers.js counts them, and found again.

    Weights that would lie in the graph lie beside it where they pass the size that was asked for.
    """
    source = write_qwen3(tmp_path / "checkpoint", seed=1)
    small = export(source, tmp_path / "small", precisions="fp32", max_shard_size="70KB")
    monkeypatch.setattr(writing, "INLINE_BYTES", 10_000)
    whole = export(source, tmp_path / "whole", precisions="fp32")
    picture = np.zeros((40, 60, 3), np.uint8)
    answers = []
    for bundle, most in ((small, 70_000), (whole, 2_000_000_000)):
        for component in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
            files = bundle.variant(component, "fp32").data
            name = f"onnx/{component}.onnx_data"
            if not files:  # all of it is less than one file may hold
                assert bundle.manifest.files[f"onnx/{component}.onnx"].size < most
                continue
            assert files == (name, *(f"{name}_{i}" for i in range(1, len(files))))
            assert all(0 < bundle.manifest.files[one].size <= most for one in files)
        with VLM.open(bundle, precision="fp32") as vlm:
            answers.append(vlm.caption(picture, max_new_tokens=6).token_ids)
    assert len(small.variant("decoder_model_merged", "fp32").data) > 1
    assert len(whole.variant("decoder_model_merged", "fp32").data) == 1
    assert answers[0] == answers[1]


def test_no_more_files_than_clients_read(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "DATA_FILES", 5)
    with raises(ExportError, "export.too-many-files", "5") as caught:
        export(tiny_checkpoint, tmp_path / "out", precisions="fp32", max_shard_size=1)
    assert "larger" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    for name in ("INLINE_BYTES", "DATA_FILE_BYTES"):
        monkeypatch.setattr(writing, name, 1000)
    with raises(ExportError, "export.too-many-files") as caught:
        export(tiny_checkpoint, tmp_path / "out", precisions="fp32")
    assert "fewer bits" in (caught.value.hint or "")
