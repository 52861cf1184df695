"""What a killed export leaves: the next one removes it or puts it back, and loses no bundle."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.exporter.comparing import contents
from tests.processes import started
from vlmport.errors import ExportWarning
from vlmport.exporter import folder
from vlmport.exporter.folder import atomic_folder, recover

CHILD = """
import sys, time
from pathlib import Path
from vlmport.exporter.folder import atomic_folder
with atomic_folder(Path(sys.argv[1]), force=True) as partial:
    (partial / "half").write_text("written")
    print(partial, flush=True)
    time.sleep(120)
"""


def code_of(out: Path) -> str | None:
    with pytest.warns(ExportWarning) as caught:
        recover(out)
    (warning,) = caught
    assert str(out.parent) in str(warning.message)
    return warning.message.code if isinstance(warning.message, ExportWarning) else None


def moved_aside(out: Path) -> Path:
    aside = out.with_name(f".{out.name}.old-abc12_xy")
    aside.mkdir()
    out.rename(aside / "bundle")
    return aside


def test_a_killed_export_is_cleaned_up_and_a_running_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started([sys.executable, "-c", CHILD, out]) as process:
        assert process.stdout is not None
        partial = Path(process.stdout.readline().strip())
        recover(out)
        assert (partial / "half").exists()
        process.kill()
    assert (partial / "half").exists()
    assert code_of(out) == "export.leftovers-removed"
    assert list(tmp_path.iterdir()) == []


def test_threads_do_not_take_each_other_s(tmp_path: Path) -> None:
    """A lock is of the folder that was opened, not of the process."""
    with atomic_folder(tmp_path / "out", force=False) as partial:
        recover(tmp_path / "out")
        assert partial.is_dir()


@pytest.mark.parametrize("empty", [False, True])
def test_a_bundle_that_was_moved_aside_is_put_back(empty: bool, own_bundle_folder: Path) -> None:
    before = contents(own_bundle_folder)
    aside = moved_aside(own_bundle_folder)
    if empty:
        own_bundle_folder.mkdir()
    assert code_of(own_bundle_folder) == "export.bundle-restored"
    assert contents(own_bundle_folder) == before
    assert not aside.exists()


def test_the_next_export_puts_it_back_too(own_bundle_folder: Path) -> None:
    before = contents(own_bundle_folder)
    moved_aside(own_bundle_folder)
    with (
        pytest.warns(ExportWarning) as warned,
        pytest.raises(KeyboardInterrupt),
        atomic_folder(own_bundle_folder, force=True),
    ):
        raise KeyboardInterrupt
    assert [getattr(one.message, "code", "") for one in warned] == ["export.bundle-restored"]
    assert contents(own_bundle_folder) == before


def test_an_old_bundle_goes_where_a_whole_one_came(own_bundle_folder: Path) -> None:
    shutil.copytree(own_bundle_folder, own_bundle_folder.with_name("new"))
    aside = moved_aside(own_bundle_folder)
    own_bundle_folder.with_name("new").rename(own_bundle_folder)
    assert code_of(own_bundle_folder) == "export.leftovers-removed"
    assert not aside.exists()


def test_the_only_whole_copy_is_kept(own_bundle_folder: Path) -> None:
    before = contents(own_bundle_folder)
    aside = moved_aside(own_bundle_folder)
    own_bundle_folder.mkdir()
    (own_bundle_folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert code_of(own_bundle_folder) == "export.bundle-kept"
    assert contents(aside / "bundle") == before


def test_what_could_not_be_put_back_is_kept(
    own_bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else takes the place while the old bundle is aside."""
    before = contents(own_bundle_folder)
    rename = os.rename

    def beaten(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == "bundle":
            own_bundle_folder.mkdir()
            (own_bundle_folder / "other").touch()

    monkeypatch.setattr(os, "rename", beaten)
    with (
        pytest.raises(folder.ExportError),
        atomic_folder(own_bundle_folder, force=True) as partial,
    ):
        (partial / "file").touch()
    (aside,) = own_bundle_folder.parent.glob(".own-bundle.old-*")
    assert contents(aside / "bundle") == before


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "fcntl", None)
    left = tmp_path / ".out.partial-abcdefgh"
    left.mkdir()
    recover(tmp_path / "out")
    assert left.exists()
    os.utime(left, (0, time.time() - 2 * folder.ABANDONED_AFTER))
    assert code_of(tmp_path / "out") == "export.leftovers-removed"


def test_what_only_looks_alike_is_left_alone(tmp_path: Path) -> None:
    names = [".other.partial-abcdefgh", ".out.partial", "out.partial-abcdefgh"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.old-abcdefgh").symlink_to(tmp_path / names[0])
    recover(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 4
