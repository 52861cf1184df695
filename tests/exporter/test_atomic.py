"""An export that fails leaves everything as it was: no folder, no remains, the old bundle whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import write_prefix_checkpoint, write_weights
from tests.errors import raises
from tests.exporter.comparing import contents
from vlmport.errors import ExportError, TokenizerError, VlmportError, WeightError
from vlmport.exporter import export, folder, golden


class BrokenError(Exception):
    """What a stage raises."""


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raise_it


def change_weights(checkpoint: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    write_weights(checkpoint, tensors)


def no_weight(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    change_weights(checkpoint, lambda tensors: tensors.pop("projection.projection.bias"))
    return WeightError


def nan_in_the_decoder(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    """Found when half of the files are written."""
    key = "language_model.base_model.model.model.norm.weight"
    change_weights(checkpoint, lambda tensors: tensors[key].fill(np.nan))
    return WeightError


def broken_tokenizer(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    (checkpoint / "tokenizer.json").write_text("{}", encoding="utf-8")
    return TokenizerError


def file_vanishes(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    """Between the headers and the values."""
    save = onnx_ir.save

    def vanish(*args: Any, **kwargs: Any) -> None:
        (checkpoint / "model.safetensors").unlink(missing_ok=True)
        save(*args, **kwargs)

    patch.setattr(onnx_ir, "save", vanish)
    return WeightError


def checker_fails(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    patch.setattr(onnx.checker, "check_model", fail(onnx.checker.ValidationError("bad")))
    return ExportError


def golden_fails(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    patch.setattr("vlmport.exporter.golden.record_golden", fail(BrokenError()))
    return BrokenError


def full_disk(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    patch.setattr(onnx, "save", fail(OSError(errno.ENOSPC, "No space left on device")))
    return ExportError


def full_disk_at_the_end(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    error = OSError(errno.ENOSPC, "No space left on device")
    patch.setattr("vlmport.exporter.exporter.write_card", fail(error))
    return ExportError


def too_little_space(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    usage = shutil.disk_usage(checkpoint)._replace(free=1000)
    patch.setattr(shutil, "disk_usage", lambda path: usage)
    return ExportError


def rename_fails(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    patch.setattr(os, "rename", refuse)
    return ExportError


def interrupt_between_renames(checkpoint: Path, patch: pytest.MonkeyPatch) -> type[BaseException]:
    rename = os.rename

    def interrupt(source: Any, target: Any) -> None:
        if ".partial-" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    patch.setattr(os, "rename", interrupt)
    return KeyboardInterrupt


STAGES = [
    no_weight,
    nan_in_the_decoder,
    broken_tokenizer,
    file_vanishes,
    checker_fails,
    golden_fails,
    full_disk,
    full_disk_at_the_end,
    too_little_space,
    rename_fails,
    interrupt_between_renames,
]
stages = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)


@stages
def test_nothing_is_left(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner")
    expected = stage(checkpoint, monkeypatch)
    with pytest.raises(expected) as caught:
        export(checkpoint, tmp_path / "not/there/out", precisions="fp32")
    if isinstance(caught.value, VlmportError):
        assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["captioner"]


@stages
def test_the_old_bundle_stays(
    stage: Any, own_bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner", seed=1)
    before = contents(own_bundle_folder)
    expected = stage(checkpoint, monkeypatch)
    with pytest.raises(expected):
        export(checkpoint, own_bundle_folder, precisions="fp32", force=True)
    assert contents(own_bundle_folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captioner", "own-bundle"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_ctrl_c_at_any_moment(share: float, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny_checkpoint, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_that_is_full_is_said_so(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(tiny_checkpoint, monkeypatch)
    with raises(ExportError, "export.disk-full", tmp_path / "out", "no partial export is left"):
        export(tiny_checkpoint, tmp_path / "out")
    monkeypatch.undo()
    too_little_space(tiny_checkpoint, monkeypatch)
    with pytest.raises(ExportError, match=r"the disk is full: \d+ MB needed, 0 MB free"):
        export(tiny_checkpoint, tmp_path / "out")


def test_force_replaces_all_of_the_old(own_bundle_folder: Path, tmp_path: Path) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner", seed=1)
    export(checkpoint, own_bundle_folder, precisions="fp32", force=True)
    export(checkpoint, tmp_path / "fresh", precisions="fp32")
    assert contents(own_bundle_folder) == contents(tmp_path / "fresh")
    assert os.stat(own_bundle_folder).st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "foreign", ["notes.txt", ".git/HEAD", "onnx/mine.onnx", "ckpt/config.json"]
)
def test_force_deletes_nothing_that_is_not_ours(
    foreign: str, own_bundle_folder: Path, tiny_checkpoint: Path
) -> None:
    path = own_bundle_folder / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    error = refused(tiny_checkpoint, own_bundle_folder, force=True)
    assert f"holds 1 files that are not the bundle's, so it is not overwritten: '{foreign}'" in str(
        error
    )


def test_a_checkpoint_inside_the_target_is_not_lost(own_bundle_folder: Path) -> None:
    inside = write_prefix_checkpoint(own_bundle_folder / "checkpoint")
    refused(inside, own_bundle_folder, force=True)


def test_a_link_is_followed_and_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(tiny_checkpoint, tmp_path / "link", precisions="fp32")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/vlmport.json").is_file()


def test_here_and_home_are_folders_too(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(tiny_checkpoint, ".", precisions="fp32")
    assert (tmp_path / "here/vlmport.json").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    export(tiny_checkpoint, "~/there", precisions="fp32")
    assert (tmp_path / "there/vlmport.json").is_file()


# The target


def refused(checkpoint: Path, out: Path, **options: Any) -> ExportError:
    before = contents(out.parent)
    with pytest.raises(ExportError) as caught:
        export(checkpoint, out, **options)
    assert contents(out.parent) == before
    assert caught.value.hint
    return caught.value


def test_a_bundle_is_not_overwritten_unasked(
    tiny_checkpoint: Path, own_bundle_folder: Path
) -> None:
    error = refused(tiny_checkpoint, own_bundle_folder)
    assert error.code == "export.bundle-exists"
    assert str(own_bundle_folder) in str(error)
    assert "--force" in (error.hint or "")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_is_never_touched(
    force: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work", encoding="utf-8")
    error = refused(tiny_checkpoint, tmp_path / "out", force=force)
    assert "not empty and not a bundle" in str(error)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_touched(force: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("years of work", encoding="utf-8")
    assert "is a file" in str(refused(tiny_checkpoint, tmp_path / "out", force=force))
    error = refused(tiny_checkpoint, tmp_path / "out/deeper/still", force=force)
    assert "out: is a file" in str(error)


def test_the_checkpoint_itself_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner")
    refused(checkpoint, checkpoint, force=True)


def test_an_empty_folder_is_filled(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(tiny_checkpoint, tmp_path / "out", precisions="fp32")
    assert (tmp_path / "out/vlmport.json").is_file()


def test_a_bundle_that_appeared_meanwhile_stays(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Two exports to one place: without force the second does not replace the first."""
    with raises(ExportError, "export.bundle-exists"):
        write_late(tmp_path / "out", tiny_bundle)
    assert contents(tmp_path / "out") == contents(tiny_bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write_late(out: Path, other: Path) -> None:
    with folder.atomic_folder(out, force=False) as partial:
        (partial / "file").write_text("second", encoding="utf-8")
        shutil.copytree(other, out)


@pytest.mark.parametrize("wrong", ["fp31", "", "q4,fp8", "fp32;q4"])
def test_unknown_precisions_are_refused_first(
    wrong: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    error = refused(tiny_checkpoint, tmp_path / "out", precisions=wrong)
    assert "precision" in str(error)
    assert error.hint == "choose from fp32, fp16, q8, q4, q4f16"


# Progress


def test_progress_grows_to_the_total(tiny_checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    bundle = export(tiny_checkpoint, tmp_path / "out", progress=lambda *call: calls.append(call))
    done, totals, files = zip(*calls, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    written = {
        variant.model for forms in bundle.manifest.components.values() for variant in forms.values()
    }
    assert set(files) == written - {"onnx/image_processor.onnx"}  # it has no weights
    weights = sum(entry.size for name, entry in bundle.manifest.files.items() if name in written)
    assert done[-1] < weights


def test_the_golden_is_recorded_from_the_written_files(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    record = golden.record
    monkeypatch.setattr(
        "vlmport.exporter.exporter.record",
        lambda bundle, precisions: opened.append(bundle.folder) or record(bundle, precisions),
    )
    export(tiny_checkpoint, tmp_path / "out", precisions="fp32")
    assert ".out.partial-" in opened[0].name
    raw = json.loads((tmp_path / "out/vlmport.json").read_text(encoding="utf-8"))
    assert raw["golden"]["expected"]["fp32"]["tokens"]
