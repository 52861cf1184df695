"""Weights that don't fit are all named, with near names; nothing is dropped, nothing is read."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.checkpoints import write_prefix_checkpoint, write_weights
from tests.exporter.test_same_model import write_adapter
from vlmport.bundle import Bundle
from vlmport.checkpoint import LazyTensor
from vlmport.cli import app
from vlmport.errors import AdapterError, VlmportError, WeightError
from vlmport.exporter import assign, export

ROOT = Path(__file__).parents[2]
LAYER = "language_model.base_model.model.model.layers.1."


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_prefix_checkpoint(tmp_path / "captioner")


def export_changed(
    checkpoint: Path, change: Callable[[dict[str, np.ndarray]], Any], **options: Any
) -> VlmportError:
    """The error of an export after the stored tensors were changed."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    write_weights(checkpoint, tensors)
    with pytest.raises(WeightError) as caught:
        export(checkpoint, checkpoint.parent / "out", **options)
    assert not (checkpoint.parent / "out").exists()
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_missing_weight_is_named(checkpoint: Path) -> None:
    error = export_changed(checkpoint, lambda t: t.pop(f"{LAYER}mlp.up_proj.weight"))
    assert "1 of 60 weights unset: 'language_model.model.layers.1.mlp.up_proj.weight'" in str(error)


def test_a_renamed_weight_is_guessed(checkpoint: Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["projection.proj.weight"] = tensors.pop("projection.projection.weight")

    error = export_changed(checkpoint, rename)
    assert "'projection.projection.weight' (did you mean 'projection.proj.weight'?)" in str(error)
    assert re.search(r"; 1 tensors .*: 'projection\.proj\.weight'$", str(error))
    assert "config.json" in str(error.hint)


def test_a_surplus_weight_is_named(checkpoint: Path) -> None:
    error = export_changed(checkpoint, lambda t: t.update(extra=np.zeros(3, np.float32)))
    assert error.code == "weights.surplus"
    assert re.fullmatch(r"1 tensors [^']*: 'extra'", str(error))
    assert error.hint is not None
    assert "--ignore-weights" in error.hint


def test_a_misshapen_weight_is_named(checkpoint: Path) -> None:
    key = "vision_encoder.vision_model.post_layernorm.weight"
    error = export_changed(checkpoint, lambda t: t.update({key: np.zeros(33, np.float32)}))
    assert error.code == "weights.misshapen"
    facts = "'vision_encoder.post_layernorm.weight' [33], expected [32]"
    assert re.fullmatch(rf"1 of 60 weights [^']*: {re.escape(facts)}", str(error))


def test_all_faults_are_gathered(checkpoint: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".mlp.down_proj." in name]:
            del tensors[name]
        tensors["projection.projection.bias"] = np.zeros((32, 1), np.float32)
        tensors["surplus.one"] = tensors["surplus.two"] = np.zeros(2, np.float32)

    text = str(export_changed(checkpoint, spoil))
    assert "2 of 60 weights unset: 'language_model.model.layers.0.mlp.down_proj.weight'" in text
    assert "'language_model.model.layers.1.mlp.down_proj.weight'" in text
    assert "1 of 60 weights have another shape" in text
    assert "'projection.projection.bias' [32, 1], expected [32]" in text
    assert re.search(r"2 tensors .*: 'surplus\.one', 'surplus\.two'$", text)


def test_many_faults_are_counted(checkpoint: Path) -> None:
    def drop_the_tower(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("vision_encoder.")]:
            del tensors[name]

    text = str(export_changed(checkpoint, drop_the_tower))
    assert "37 of 60 weights unset: 'vision_encoder.embeddings.patch_embedding.bias'" in text
    assert "… and 29 more" in text


def test_a_checkpoint_of_another_model_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near names are costly: they are looked for where they are shown, among what is left over."""
    asked: list[tuple[str, set[str]]] = []

    def record(name: str, known: Iterable[str]) -> str:
        asked.append((name, set(known)))
        return ""

    monkeypatch.setattr(assign, "did_you_mean", record)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(300)]
    ours = {f"ours.{name}" for name in names} | {"head.unused"}
    tensors = {name: cast(LazyTensor, None) for name in ours}
    assignment = assign.Assignment(tensors, wanted=set(names), missing=set(names))
    with pytest.raises(WeightError, match=r"300 of 300 weights unset: .* and 292 more"):
        assignment.finish(lambda key: key == "head.unused")
    assert [name for name, _ in asked] == sorted(names)[:8]
    assert all(known == ours - {"head.unused"} for _, known in asked)


def test_an_untied_head_that_is_missing_is_explained(tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": False}
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner", text=settings)
    key = "language_model.base_model.model.lm_head.weight"
    error = export_changed(checkpoint, lambda tensors: tensors.pop(key))
    assert "'language_model.lm_head.weight'" in str(error)
    assert "tie_word_embeddings" in str(error.hint)


def test_a_config_of_another_size_is_found(tmp_path: Path) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner")
    tensors = load_file(checkpoint / "model.safetensors")
    write_prefix_checkpoint(checkpoint, text={"num_hidden_layers": 3, "intermediate_size": 96})
    error = export_changed(checkpoint, lambda t: (t.clear(), t.update(tensors)))
    assert "9 of 69 weights unset" in str(error)
    wrong = "6 of 69 weights have another shape: "
    assert f"{wrong}'language_model.model.layers.0.mlp.down_proj.weight' [32, 64]" in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precisions", ["fp32", "q4"])
def test_values_that_are_not_finite_are_named(
    checkpoint: Path, value: float, precisions: str
) -> None:
    key = f"{LAYER}self_attn.k_proj.base_layer.weight"
    error = export_changed(checkpoint, lambda t: t[key].fill(value), precisions=precisions)
    assert error.code == "weights.not-finite"
    assert str(error).startswith(f"{key!r} ")


def test_the_same_in_an_external_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmport.exporter.writing.INLINE_BYTES", 0)
    key = f"{LAYER}mlp.up_proj.weight"
    error = export_changed(checkpoint, lambda tensors: tensors[key].fill(np.nan))
    assert key in str(error)


def test_an_adapter_of_another_shape_is_named(checkpoint: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "head_dim": 16}
    other = write_prefix_checkpoint(tmp_path / "other", text=wide)
    base = write_prefix_checkpoint(tmp_path / "base", lora=False)
    adapter = write_adapter(tmp_path / "adapter", other)
    with pytest.raises(AdapterError) as caught:
        export(base, tmp_path / "out", adapter=adapter)
    assert "8 of 8 LoRA pairs don't fit" in str(caught.value)
    assert "A [4, 32]" in str(caught.value)
    assert "A [4, 64]" in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


# Memory

MEASURE = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    from vlmport.exporter import export

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small, large, out = map(Path, sys.argv[1:])
    export(small, out / "small", precisions="fp32")  # what imports and sessions cost
    before = peak()
    import vlmport.exporter.exporter as exporter
    exporter.record = lambda bundle, precisions: bundle.manifest  # running it is not exporting it
    export(large, out / "large", precisions="fp32,q4")
    print(peak() - before)
""")


def test_an_export_holds_one_tensor_not_the_model(tmp_path: Path) -> None:
    """A 100 MB bf16 checkpoint, 200 MB in float32, whose largest tensor is 17 MB."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    text |= {"head_dim": 256}
    small = write_prefix_checkpoint(tmp_path / "small")
    large = write_prefix_checkpoint(tmp_path / "large", dtype="BF16", text=text)
    model = (large / "model.safetensors").stat().st_size * 2
    largest = 4096 * 1024 * 4
    arguments = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)
    assert model > 180e6
    assert growth < 5 * largest < model / 2, f"{growth / 1e6:.0f} MB"


SURPLUS = {"model.talker.a": np.zeros(3, "f4"), "model.talker.b": np.ones(1, "f4")}


@pytest.mark.parametrize(
    ("patterns", "code", "facts"),
    [
        ((), "weights.surplus", "'model.talker.a', 'model.talker.b'"),
        ("model.talker.a", "weights.surplus", "graph reads them: 'model.talker.b'"),
        (["model.talker.*", "talker.*"], "option.ignores-nothing", "'talker.*'"),
        ("*", "option.ignores-needed-weights", "language_model.model."),
        ("*embed_tokens*", "option.ignores-needed-weights", "embed_tokens.weight"),
        ("*base_layer.weight", "option.ignores-needed-weights", "q_proj.weight"),
    ],
)
def test_what_may_be_left_out(checkpoint: Path, patterns: Any, code: str, facts: str) -> None:
    write_weights(checkpoint, {**load_file(checkpoint / "model.safetensors"), **SURPLUS})
    out = checkpoint.parent / "out"
    with pytest.raises(VlmportError) as caught:
        export(checkpoint, out, precisions="q8", ignore_weights=patterns)
    assert caught.value.code == code
    assert facts in str(caught.value)
    assert not out.exists()


def test_what_is_left_out_is_said(checkpoint: Path) -> None:
    write_weights(checkpoint, {**load_file(checkpoint / "model.safetensors"), **SURPLUS})
    out = checkpoint.parent / "out"
    patterns = ["--ignore-weights", "*.talker.a", "--ignore-weights", "model.talker.b"]
    command = ["export", str(checkpoint), str(out), "-p", "q8", *patterns]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    ignored = Bundle.open(out).manifest.ignored_weights
    assert ignored == {"*.talker.a": ("model.talker.a",), "model.talker.b": ("model.talker.b",)}
    assert "`*.talker.a`" in (out / "README.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["inspect", str(out)], catch_exceptions=False).stdout
    assert "*.talker.a: 1, 'model.talker.a'" in shown
