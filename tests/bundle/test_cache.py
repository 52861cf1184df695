"""Exported bundles are found again, made anew when anything changed, and don't pile up."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vlmport.bundle import MANIFEST
from vlmport.bundle import cache as bundle_cache
from vlmport.bundle.cache import (
    ABANDONED_AFTER,
    SUPERSEDED_AFTER,
    UNUSED_AFTER,
    entry_name,
    open_entry,
    prune,
)
from vlmport.loading import resolve

NOW = ("0" * 8, "a" * 16)  # a request, and what it depends on now


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/bundles"


def entry(cache: Path, request: str, depends: str, unused: float) -> Path:
    """An entry that was last used so many seconds ago."""
    folder = cache / f"captioner-{request}-{depends}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}", encoding="utf-8")
    age(folder, unused)
    return folder


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_name_says_what_it_depends_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = entry_name(tiny_checkpoint, None, ("fp32", "q4"))
    assert first == entry_name(tiny_checkpoint, None, ("q4", "fp32"))
    checkpoint, request, depends = first.rsplit("-", 2)
    assert checkpoint == tiny_checkpoint.name
    for other in (
        entry_name(tiny_checkpoint, None, ("fp32",)),
        entry_name(tiny_checkpoint, tiny_checkpoint, ("fp32", "q4")),
    ):
        assert other.rsplit("-", 2)[1] != request
    monkeypatch.setattr(bundle_cache, "_code", lambda: "other code")
    changed = entry_name(tiny_checkpoint, None, ("fp32", "q4")).rsplit("-", 2)
    assert changed[:2] == [checkpoint, request]
    assert changed[2] != depends


def test_a_template_in_a_folder_of_its_own_counts(tmp_path: Path) -> None:
    """transformers reads additional_chat_templates/*.jinja, and so does the export."""
    template = tmp_path / "additional_chat_templates" / "default.jinja"
    template.parent.mkdir()
    template.write_text("one", encoding="utf-8")
    before = entry_name(tmp_path, None, ("fp32",))
    template.write_text("another", encoding="utf-8")
    assert entry_name(tmp_path, None, ("fp32",)) != before


def test_the_code_is_every_module_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        bundle_cache._code.cache_clear()
        return bundle_cache._code()

    here = digest()
    (tmp_path / "graph").mkdir()
    monkeypatch.setattr(bundle_cache.resources, "files", lambda name: tmp_path)
    empty = digest()
    (tmp_path / "graph/decoder.py").write_text("x = 1", encoding="utf-8")
    one = digest()
    (tmp_path / "graph/decoder.py").write_text("x = 2", encoding="utf-8")
    assert len({here, empty, one, digest()}) == 4
    monkeypatch.undo()
    assert digest() == here


def test_a_use_is_noted(tiny_checkpoint: Path, cache: Path) -> None:
    folder = resolve(tiny_checkpoint, precisions=("fp32",)).folder
    age(folder, UNUSED_AFTER + 60)
    assert resolve(tiny_checkpoint, precisions=("fp32",)).folder == folder
    assert time.time() - folder.stat().st_mtime < 60


def test_an_export_prunes(
    tiny_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resolve(tiny_checkpoint, precisions=("fp32",)).folder
    monkeypatch.setattr(bundle_cache, "_code", lambda: "other code")
    young = resolve(tiny_checkpoint, precisions=("fp32",)).folder
    assert young != before
    assert before.is_dir()  # perhaps in use
    age(before, SUPERSEDED_AFTER + 60)
    monkeypatch.setattr(bundle_cache, "_code", lambda: "newest code")
    newest = resolve(tiny_checkpoint, precisions=("fp32",)).folder
    assert {*cache.iterdir()} == {young, newest}


def test_what_goes_and_what_stays(cache: Path) -> None:
    kept = entry(cache, *NOW, unused=2 * UNUSED_AFTER)
    stays = [
        kept,
        entry(cache, NOW[0], "b" * 16, unused=SUPERSEDED_AFTER - 60),
        entry(cache, "1" * 8, "b" * 16, unused=UNUSED_AFTER - 60),
        cache / "mine-0123456789abcdef",  # no bundle
        cache / "notes",
        cache / ".captioner.partial-abc",
    ]
    goes = [
        entry(cache, NOW[0], "c" * 16, unused=SUPERSEDED_AFTER + 60),
        entry(cache, "1" * 8, "c" * 16, unused=UNUSED_AFTER + 60),
        cache / ".captioner.partial-def",
        cache / ".captioner.old-def",
    ]
    for path in (*stays, *goes):
        path.mkdir(exist_ok=True)
    for path in (*goes[2:], cache / "mine-0123456789abcdef", cache / "notes"):
        age(path, UNUSED_AFTER + ABANDONED_AFTER)
    prune(kept)
    assert {*cache.iterdir()} == {*stays}


def test_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    kept = entry(cache, *NOW, unused=0)
    elsewhere = entry(tmp_path, "1" * 8, "b" * 16, unused=2 * UNUSED_AFTER)
    (cache / elsewhere.name).symlink_to(elsewhere)
    prune(kept)
    assert (elsewhere / MANIFEST).is_file()
    assert (cache / elsewhere.name).is_symlink()


def test_an_entry_that_is_used_meanwhile_comes_back(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process marks it as used after its age was read, before it is renamed."""
    kept = entry(cache, *NOW, unused=0)
    used = entry(cache, "1" * 8, "b" * 16, unused=2 * UNUSED_AFTER)
    rename = os.rename

    def used_first(source: Path, target: Path) -> None:
        if source == used:
            os.utime(used)
        rename(source, target)

    monkeypatch.setattr(bundle_cache.os, "rename", used_first)
    prune(kept)
    assert {*cache.iterdir()} == {kept, used}
    assert (used / MANIFEST).is_file()


def test_nothing_is_no_entry(cache: Path) -> None:
    assert open_entry(cache / "nothing") is None
    prune(cache / "nothing")
