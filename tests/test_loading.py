"""A source, whatever it is, becomes a bundle; a checkpoint is exported once and found again."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.exporter.comparing import contents
from tests.exporter.test_same_model import write_adapter
from tests.processes import started
from vlmport import builtin
from vlmport.bundle import MANIFEST, Bundle
from vlmport.errors import (
    AdapterError,
    BundleError,
    OptionError,
    SourceError,
    WeightError,
)
from vlmport.exporter import export, exporter
from vlmport.loading import cache_folder, load, resolve

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/bundles"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were exported, in order."""
    done: list[Path] = []
    export = exporter.export

    def counted(folder: Path, *args: Any, **kwargs: Any) -> Bundle:
        done.append(folder)
        return export(folder, *args, **kwargs)

    monkeypatch.setattr("vlmport.exporter.export", counted)
    return done


def test_a_checkpoint_is_exported_once(
    tiny_checkpoint: Path, exports: list[Path], cache: Path
) -> None:
    first = resolve(tiny_checkpoint)
    assert first.folder.parent == cache == cache_folder()
    assert first.manifest.name == "captioner"
    assert resolve(str(tiny_checkpoint)).folder == first.folder
    assert exports == [tiny_checkpoint]


def test_a_bundle_is_taken_as_it_is(tiny_bundle: Path, exports: list[Path], cache: Path) -> None:
    assert resolve(tiny_bundle).folder == tiny_bundle
    assert exports == []
    assert not cache.exists()


def test_a_home_folder_is_found(
    tiny_bundle: Path, tiny_checkpoint: Path, exports: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_bundle.parent))
    assert resolve(f"~/{tiny_bundle.name}").folder == tiny_bundle
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    assert resolve(f"~/{tiny_checkpoint.name}").manifest.name == "captioner"
    assert exports == [tiny_checkpoint]


def test_a_builtin_name_is_its_checkpoint(
    tiny_checkpoint: Path, exports: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(builtin, "builtin_models", lambda: {"figures": tiny_checkpoint})
    monkeypatch.chdir(tmp_path)
    assert resolve("figures").manifest.name == "figures"
    assert exports == [tiny_checkpoint]
    with raises(SourceError, "source.no-revision", "'v2'"):
        resolve("figures", revision="v2")
    # A folder of that name comes first.
    write_prefix_checkpoint(tmp_path / "figures", seed=1)
    resolve("figures")
    assert exports[1:] == [Path("figures")]


def test_export_knows_builtin_names(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(builtin, "builtin_models", lambda: {"figures": tiny_checkpoint})
    bundle = export("figures", tmp_path / "out", precisions="fp32")
    assert bundle.manifest.name == "figures"


def test_a_precision_asked_for_by_name_is_exported_alone(tmp_path: Path) -> None:
    """Beside the default, whose 8 and 4 bits hold a width that no block of 32 divides too."""
    narrow = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 2}
    folder = write_prefix_checkpoint(tmp_path / "narrow", text=narrow)
    with load(folder) as vlm:
        assert vlm.precisions == ("fp32", "q8", "q4")
        assert vlm.caption(Image.new("RGB", (40, 30), "red"), max_new_tokens=3).token_ids
    with load(folder, precision="fp32") as vlm:
        assert vlm.precisions == ("fp32",)


def test_a_changed_checkpoint_is_exported_anew(tmp_path: Path, exports: list[Path]) -> None:
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    first = resolve(folder)
    write_prefix_checkpoint(folder, seed=1)
    second = resolve(folder)
    assert second.folder != first.folder
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}', encoding="utf-8")
    third = resolve(folder)
    assert third.manifest.generation.stop_token_ids == (5,)
    (folder / "notes.md").write_text("nothing that matters", encoding="utf-8")
    assert resolve(folder).folder == third.folder
    assert len(exports) == 3


def test_precisions_and_adapters_have_bundles_of_their_own(
    tiny_checkpoint: Path, tmp_path: Path, exports: list[Path]
) -> None:
    base = write_prefix_checkpoint(tmp_path / "base", lora=False)
    adapter = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    plain = resolve(base, precisions=("fp32",))
    adapted = resolve(base, precisions=("fp32",), adapter=adapter)
    assert plain.manifest.files != adapted.manifest.files
    assert resolve(base, precisions=("fp32",), adapter=adapter).folder == adapted.folder
    assert resolve(base, precisions=("q4",)).manifest.precisions == ("q4",)
    assert len(exports) == 3
    (adapter / "adapter_config.json").touch()
    os.utime(adapter / "adapter_config.json", (1, 1))
    assert resolve(base, precisions=("fp32",), adapter=adapter).folder != adapted.folder


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def spoil_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{", encoding="utf-8")


def lose_a_graph(folder: Path) -> None:
    (folder / "onnx/vision_encoder.onnx").unlink()


def cut_a_graph(folder: Path) -> None:
    graph = folder / "onnx/vision_encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage", [lose_the_manifest, spoil_the_manifest, lose_a_graph, cut_a_graph]
)
def test_a_damaged_cache_is_mended(damage: Any, tiny_checkpoint: Path, exports: list[Path]) -> None:
    folder = resolve(tiny_checkpoint, precisions=("fp32",)).folder
    whole = contents(folder)
    damage(folder)
    resolve(tiny_checkpoint, precisions=("fp32",))
    assert contents(folder) == whole
    assert len(exports) == 2


def test_a_failed_export_leaves_no_cache(tmp_path: Path, cache: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path / "captioner", text={"num_hidden_layers": 2})
    write_prefix_checkpoint(tmp_path / "other", text={"num_hidden_layers": 3})
    shutil.copyfile(tmp_path / "other/config.json", folder / "config.json")
    with pytest.raises(WeightError):
        resolve(folder)
    assert not cache.exists()


def test_another_process_may_be_first(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bundle appears while ours is being written."""
    export = exporter.export

    def beaten(folder: Path, out: Path, **options: Any) -> Bundle:
        export(folder, out, **options)
        return export(folder, out, **options)

    monkeypatch.setattr("vlmport.exporter.export", beaten)
    bundle = resolve(tiny_checkpoint, precisions=("fp32",))
    assert bundle.manifest.precisions == ("fp32",)


def test_two_processes_at_once(tiny_checkpoint: Path, cache: Path) -> None:
    code = "import sys; from vlmport.loading import resolve; print(resolve(sys.argv[1]).folder)"
    command = [sys.executable, "-c", code, tiny_checkpoint]
    with started(command) as first, started(command) as second:
        both = first, second
        answers = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0] == answers[1]
    assert [str(path) for path in cache.iterdir()] == [answers[0][0].strip()]
    Bundle.open(next(cache.iterdir()), check_hashes=True)


def test_an_adapter_can_not_go_into_a_bundle(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    with raises(OptionError, "source.is-bundle") as caught:
        resolve(tiny_bundle, adapter=adapter)
    assert caught.value.hint == "export the checkpoint again with --adapter"


def test_an_adapter_must_fit(tiny_checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_checkpoint, r=5)
    with raises(AdapterError, "adapter.not-of-this-model", "8", "8"):
        resolve(tiny_checkpoint, adapter=adapter)
    with pytest.raises(SourceError, match=r"no adapter_config\.json"):
        resolve(tiny_checkpoint, adapter=tiny_checkpoint)
    assert not cache.exists()


@pytest.mark.parametrize("wrong", ["", "nothing", "./nothing", "/nothing/there", "a b/c"])
def test_what_is_nowhere_is_refused(wrong: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(wrong)
    assert caught.value.hint


def test_a_broken_bundle_is_not_exported_over(own_bundle_folder: Path) -> None:
    lose_a_graph(own_bundle_folder)
    with raises(BundleError, "bundle.not-as-listed", "vision_encoder.onnx"):
        resolve(own_bundle_folder)


def test_load_gives_a_model(tiny_checkpoint: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    with load(tiny_checkpoint, precision="vision=fp32", progress=lambda *c: calls.append(c)) as vlm:
        assert vlm.precisions == ("fp32", "q8", "q4")
        assert vlm.components.choice["vision_encoder"] == "fp32"
        assert vlm.components.choice["decoder_model_merged"] == "q4"
    assert calls
    assert calls[-1][0] == calls[-1][1]
