"""Token ids past the embedding: compared when a model is exported, and checked before each look-up.

Some kernels give zeros for such an id, and some count a negative one from the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tokenizers import AddedToken, Tokenizer

from tests.checkpoints import write_json
from tests.errors import raises
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from vlmport.errors import CheckpointWarning, PromptError, TokenizerError
from vlmport.exporter import export
from vlmport.files.onnx_bytes import table_rows
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.model import VLM
from vlmport.runtime.request import new_request

EXTRA = "<extra>"
PRECISIONS = ("fp32", "q8", "q4")


def write_with_extra(
    folder: Path, *, special: bool = False, pad: bool = False, template: str = ""
) -> Path:
    """A checkpoint whose tokenizer knows one token more than the embedding has rows."""
    write_idefics3_checkpoint(folder)
    rows = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]["vocab_size"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fill = [f"<fill-{n}>" for n in range(rows - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([*fill, AddedToken(EXTRA, special=special)])
    assert tokenizer.token_to_id(EXTRA) == rows
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config |= {"pad_token": EXTRA} if pad else {}
    config["chat_template"] += template
    write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was exported with a warning."""
    folder = tmp_path_factory.mktemp("token-ids")
    with pytest.warns(CheckpointWarning, match=f"'{EXTRA} = 288'") as warned:
        export(write_with_extra(folder / "checkpoint"), folder / "out", precisions=PRECISIONS)
    (one,) = [w.message for w in warned if isinstance(w.message, CheckpointWarning)]
    assert one.code == "tokenizer.token-past-embedding"
    return folder / "out"


@pytest.mark.parametrize(
    ("special", "pad", "template", "refused"),
    [
        (True, False, "", True),
        (False, False, f"{{# {EXTRA} #}}", True),
        (True, True, "", False),
    ],
    ids=["special", "in the template", "padding"],
)
def test_what_prompts_need_is_refused(
    special: bool, pad: bool, template: str, refused: bool, tmp_path: Path
) -> None:
    folder = write_with_extra(tmp_path / "c", special=special, pad=pad, template=template)
    if not refused:
        with pytest.warns(CheckpointWarning, match=EXTRA):
            export(folder, tmp_path / "out", precisions="fp32")
        return
    with raises(
        TokenizerError, "tokenizer.token-past-embedding", "288 rows", f"'{EXTRA} = 288'"
    ) as caught:
        export(folder, tmp_path / "out", precisions="fp32")
    assert caught.value.code == "tokenizer.token-past-embedding"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_text_that_holds_such_a_token(bundle: Path, precision: str) -> None:
    with VLM.open(bundle, precision=precision, threads=1) as model:
        said = model.generate([{"role": "user", "content": "a"}], max_new_tokens=2)
        assert said.token_ids
        with raises(
            PromptError, "prompt.token-past-embedding", "token 288", EXTRA, "288 rows"
        ) as caught:
            model.generate([{"role": "user", "content": f"a {EXTRA} b"}], max_new_tokens=2)
        assert caught.value.code == "prompt.token-past-embedding"
        for wrong in (-1, -288, 288, 2**40):
            with raises(PromptError, "prompt.token-past-embedding", f"token {wrong} ") as caught:
                model.components.embed(np.array([[1, wrong]]))
            assert caught.value.code == "prompt.token-past-embedding"


def cut(bundle: Path, folder: Path, precision: str, rows: int) -> Components:
    """The same bundle with an embedding of fewer rows, and a manifest that does not know."""
    shutil.copytree(bundle, folder)
    suffix = {"fp32": "", "q8": "_quantized", "q4": "_q4"}[precision]
    path = folder / f"onnx/embed_tokens{suffix}.onnx"
    graph = onnx.load(path)
    for table in graph.graph.initializer:
        if table.dims and table.dims[0] == 288:
            values = numpy_helper.to_array(table)[:rows]
            table.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), table.name))
    onnx.save(graph, path)
    manifest = json.loads((folder / "vlmport.json").read_text("utf-8"))
    manifest["files"][f"onnx/{path.name}"]["size"] = path.stat().st_size
    write_json(folder / "vlmport.json", manifest)
    assert table_rows(path, "input_ids") == rows
    return Components.open(folder, precision=precision, threads=1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_with_fewer_rows_than_the_head_has(
    bundle: Path, precision: str, tmp_path: Path
) -> None:
    """What the model says itself is looked up too: it is no zeros, and no other token."""
    components = cut(bundle, tmp_path / "cut", precision, 70)
    embeds = components.embed(np.array([[5, 69, 7]]))[0]
    request = new_request(components, embeds, GenerationOptions(max_new_tokens=40))
    with raises(PromptError, "prompt.token-past-embedding", "70") as caught:
        Generation(components, [request]).run()
    assert caught.value.code == "prompt.token-past-embedding"
    (wrong,) = request.tokens[-1:]
    assert f"token {wrong} " in str(caught.value)
    assert all(token < 70 for token in request.tokens[:-1])


def shapes(names: Iterable[str]) -> list[onnx.ValueInfoProto]:
    return [onnx.helper.make_tensor_value_info(one, onnx.TensorProto.INT64, ["n"]) for one in names]


@pytest.mark.parametrize(
    ("operator", "indices", "attributes", "rows"),
    [
        ("Gather", "input_ids", {}, 6),
        ("Gather", "input_ids", {"axis": 1}, 4),
        ("Gather", "other", {}, None),
        ("Mul", "input_ids", {}, None),
        ("Gather", "input_ids", {"axis": 7}, None),
        ("Gather", "input_ids", {"axis": -1}, None),
    ],
)
def test_rows_are_read_from_the_graph(
    operator: str, indices: str, attributes: dict[str, int], rows: int | None, tmp_path: Path
) -> None:
    table = numpy_helper.from_array(np.zeros((6, 4), np.int64), "table")
    node = onnx.helper.make_node(operator, ["table", indices], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "g", shapes(["input_ids", "other"]), shapes(["y"]))
    graph.initializer.append(table)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert table_rows(tmp_path / "model.onnx", "input_ids") == rows
