"""What the golden probe opens: the shipped graph's nodes, in an order that takes less memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.qwen_checkpoints import write_qwen2_5
from vlmport.bundle import Bundle
from vlmport.errors import BundleError
from vlmport.exporter import export, writing
from vlmport.exporter.packing import PREFIX, largest_first
from vlmport.runtime.probe import open_graphs, record_golden, run_golden

DECODER = "decoder_model_merged"
WIDE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}
OPEN = """
import contextlib, sys

def status(key):  # ru_maxrss would start with that of the parent
    return 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])

from vlmport.bundle import Bundle
from vlmport.exporter.packing import largest_first
from vlmport.runtime.graphs.components import Components

bundle, order = Bundle.open(sys.argv[1]), sys.argv[2]
ordered = largest_first(bundle, "q4") if order == "largest first" else None
with ordered or contextlib.nullcontext(bundle) as opened:
    graphs = Components.open(opened, precision="q4")
    before = status("VmRSS")
    graphs.decoder
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tiny, with the weights of every graph beside it."""
    folder = tmp_path_factory.mktemp("packing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "INLINE_BYTES", 1000)
        return export(write_qwen2_5(folder / "c"), folder / "b", precisions="fp32,fp16,q8,q4,q4f16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8", "q4", "q4f16"])
def test_the_copy_computes_the_same_bits_and_goes(bundle: Bundle, precision: str) -> None:
    golden, files = bundle.manifest.golden, sorted(bundle.folder.rglob("*"))
    shipped = run_golden(open_graphs(bundle, precision), golden)  # pyright: ignore[reportArgumentType]
    with largest_first(bundle, precision) as sparing:
        copy = sparing.variant(DECODER, precision)
        assert Path(copy.model).name.startswith(PREFIX)
        assert copy.data == bundle.variant(DECODER, precision).data
        run = run_golden(open_graphs(sparing, precision), golden)  # pyright: ignore[reportArgumentType]
    assert np.array_equal(run.logits, shipped.logits)
    assert run.tokens == shipped.tokens
    assert sorted(bundle.folder.rglob("*")) == files


def test_the_largest_weights_stand_first_and_the_rest_as_it_was(bundle: Bundle) -> None:
    def graph(one: Bundle) -> onnx.GraphProto:
        path = one.path(one.variant(DECODER, "q4").model)
        return onnx.load(path, load_external_data=False).graph

    whole = graph(bundle)
    weights, shipped = {one.name for one in whole.initializer}, list(whole.node)
    with largest_first(bundle, "q4") as sparing:
        listed = list(graph(sparing).node)
    assert "lm_head.weight_quantized" in shipped[-1].input
    assert "lm_head.weight_quantized" in listed[0].input
    assert sorted(map(str, listed)) == sorted(map(str, shipped))
    without = [node for node in shipped if weights.isdisjoint(node.input)]
    assert listed[-len(without) :] == without


def test_small_graphs_are_opened_as_they_are(tmp_path: Path) -> None:
    bundle = export(write_qwen2_5(tmp_path / "c"), tmp_path / "b", precisions="q4")
    with largest_first(bundle, "q4") as sparing:
        assert sparing == bundle


def test_what_is_recorded_is_what_the_shipped_graph_gives(bundle: Bundle) -> None:
    golden = bundle.manifest.golden
    assert record_golden(open_graphs(bundle, "q4"), golden) == golden.expected["q4"]


def test_the_shipped_graph_is_opened_too(bundle: Bundle, tmp_path: Path) -> None:
    cut = Bundle(shutil.copytree(bundle.folder, tmp_path / "cut"), bundle.manifest)
    path = cut.path(cut.variant(DECODER, "q4").data[0])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match=f"{DECODER}_q4.onnx"), largest_first(cut, "q4"):
        pass
    assert not list(cut.folder.rglob(f"{PREFIX}*"))


def test_a_shipped_graph_lists_its_nodes_as_onnx_wants_them(bundle: Bundle) -> None:
    """The copy does not, so it must not be what is shipped: ONNX's own checker refuses it."""
    model = bundle.path(bundle.variant(DECODER, "q4").model)
    onnx.checker.check_model(str(model))
    with largest_first(bundle, "q4") as sparing:
        copy = str(sparing.path(sparing.variant(DECODER, "q4").model))
        ort.InferenceSession(copy)
        with pytest.raises(onnx.checker.ValidationError, match="topological"):
            onnx.checker.check_model(copy)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_head_is_not_held_twice_on_top_of_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 million values in the head, as many in the layers."""
    monkeypatch.setattr(writing, "INLINE_BYTES", 1000)
    source = write_qwen2_5(
        tmp_path / "c", dtype="BF16", text=WIDE, config={"tie_word_embeddings": True}
    )
    bundle = export(source, tmp_path / "b", precisions="q4")

    def peak(order: str) -> int:
        command = [sys.executable, "-c", OPEN, str(bundle.folder), order]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    head = WIDE["vocab_size"] * WIDE["hidden_size"] // 2  # bytes of its levels
    saved = peak("as shipped") - peak("largest first")
    assert 0.7 * head < saved < 2 * head
