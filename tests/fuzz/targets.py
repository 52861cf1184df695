"""What is fuzzed: each target takes bad input and must give a right result or an error of ours.

Anything else that leaves a target (another exception, a hang, a MemoryError) is a defect. An error
must say something, and have no second line that a traceback would have.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fastjsonschema
import numpy as np
from hypothesis import strategies as st
from rich.console import Console

import vlmport
from tests.decoding.test_against_transformers import compare_if_any, requests, tables
from tests.fuzz import commands
from tests.fuzz.bounds import bounded
from tests.fuzz.mutations import damaged, json_texts, still_valid, written
from tests.fuzz.pictures import damaged_pictures
from tests.fuzz.templates import templates
from tests.fuzz.workshop import Workshop
from vlmport.bundle import MANIFEST, Bundle
from vlmport.bundle.layouts import COMPONENTS, FUSED, GENAI
from vlmport.checkpoint import Checkpoint, Weights
from vlmport.errors import VlmportError
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.graph.precision import PRECISIONS
from vlmport.inspection import describe, describe_onnx, probe_bundle
from vlmport.runtime.images.reading import MAX_PIXELS, MAX_SIDE, open_image
from vlmport.runtime.model import VLM
from vlmport.runtime.prompt import Prompter
from vlmport.text import chat_template

MAX_MESSAGE = 5_000
INDEX = "model.safetensors.index.json"
GRAPH = "onnx/decoder_model_merged.onnx"
SCHEMA = Path(vlmport.__file__).parent / "bundle/vlmport.schema.json"
PICTURE = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)


@contextlib.contextmanager
def ours_or_right() -> Iterator[None]:
    """Within the bounds, nothing or an error of ours may leave the block."""
    try:
        with bounded():
            yield
    except VlmportError as error:
        refused = error
    else:
        return
    text, hint = str(refused), refused.hint
    assert text.strip(), type(refused)
    assert "Traceback" not in text
    assert len(text) < MAX_MESSAGE, text[:300]
    assert hint is None or hint.strip()
    f"{text}\n{hint}".encode()  # a terminal takes no half of a character


# A checkpoint's files, each through a whole export


def export_with(shop: Workshop, name: str, data: bytes, *, adapter: bool = False) -> None:
    """Export with one file altered, and caption by what came out."""
    out = shop.folder / "exported"
    shutil.rmtree(out, ignore_errors=True)
    original = shop.adapter if adapter else shop.checkpoint()
    with shop.altered(original, name, data) as altered, ours_or_right():
        if adapter:
            bundle = export(shop.checkpoint(), out, precisions="fp32", adapter=altered)
        else:
            bundle = export(altered, out, precisions="fp32")
        with VLM.open(bundle) as vlm:
            vlm.caption(PICTURE, max_new_tokens=2)
    left = [path.name for path in shop.folder.iterdir() if ".partial" in path.name]
    assert not left, "a failed export left something behind"
    if out.exists():
        Bundle.open(out, check_hashes=True)


def document(file: Path) -> Any:
    return json.loads(file.read_bytes())


def exported_file(name: str, *, adapter: bool = False) -> Target:
    def inputs(shop: Workshop) -> st.SearchStrategy[bytes]:
        return json_texts(document((shop.adapter if adapter else shop.checkpoint()) / name))

    def run(shop: Workshop, data: bytes) -> None:
        export_with(shop, name, data, adapter=adapter)

    return Target(name, inputs, run)


def read_file(kind: str, name: str) -> Target:
    """A checkpoint's file, to all that an export makes before it reads a weight."""

    def inputs(shop: Workshop) -> st.SearchStrategy[bytes]:
        return json_texts(document(shop.checkpoint(kind) / name))

    def run(shop: Workshop, data: bytes) -> None:
        with shop.altered(shop.checkpoint(kind), name, data) as altered, ours_or_right():
            checkpoint = Checkpoint.open(altered)
            family = family_of(checkpoint)
            family.weights(checkpoint, None)
            family.hub_files()
            family.fixed_graphs()
            family.graphs(PRECISIONS["fp32"])

    return Target(f"{kind}'s {name}", inputs, run)


# safetensors


def safetensors(shop: Workshop) -> st.SearchStrategy[bytes]:
    """Headers that lie: sizes, types, offsets, overlaps, doubles, lengths; then damaged bytes."""
    whole = (shop.checkpoint() / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    few = dict(list(header.items())[:6])

    @st.composite
    def files(draw: st.DrawFn) -> bytes:
        text = draw(json_texts(draw(st.sampled_from((header, few)))))
        if draw(st.integers(0, 3)) == 0:
            text = written(lying(draw, few))
        said = draw(st.sampled_from((len(text), len(text), len(text), 0, 1, 2**40, 2**64 - 1)))
        file = struct.pack("<Q", said) + text + data
        return draw(damaged(file)) if draw(st.integers(0, 5)) == 0 else file

    return files()


def lying(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any]:
    """One tensor with another type, shape or place than it has."""
    name = draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    entry = dict(header[name])
    types = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "")
    lies = {
        "dtype": st.sampled_from(types),
        "shape": st.lists(st.sampled_from((0, 1, 2, 32, 2**31, 2**62, 2**64)), max_size=70),
        "data_offsets": st.lists(st.sampled_from((0, 1, 4, 128, 2**31, 2**63, 2**64)), max_size=3),
    }
    for key in draw(st.sets(st.sampled_from(sorted(lies)), min_size=1)):
        entry[key] = draw(lies[key])
    return {**header, name: entry}


def read_weights(shop: Workshop, data: bytes) -> None:
    with shop.altered(shop.checkpoint(), "model.safetensors", data) as folder, ours_or_right():
        weights = Weights.open(folder)
        assert sum(tensor.nbytes for tensor in weights.values()) <= len(data)
        for tensor in weights.values():
            with contextlib.suppress(VlmportError):
                assert tensor.numpy().shape == tensor.shape


def read_shards(shop: Workshop, data: bytes) -> None:
    """An index is taken where it says of every tensor where it is, and nowhere else."""
    original = shop.checkpoint("shards")
    with shop.altered(original, INDEX, data) as folder, ours_or_right():
        found = Weights.open(folder)
        assert found.keys() == Weights.open(original).keys()
        assert all(tensor.numpy().shape == tensor.shape for tensor in found.values())


def indices(shop: Workshop) -> st.SearchStrategy[bytes]:
    return json_texts(document(shop.checkpoint("shards") / INDEX))


# A bundle's files


def run_bundle(shop: Workshop, data: bytes) -> None:
    with shop.altered(shop.bundle(), MANIFEST, data) as folder, ours_or_right():
        bundle = Bundle.open(folder)
        describe(bundle, Console(file=io.StringIO()))
        with VLM.open(bundle) as vlm:
            vlm.caption(PICTURE, max_new_tokens=2)
        probe_bundle(bundle, "cpu", Console(file=io.StringIO()))


def probe_manifest(layout: str) -> Target:
    """Of a layout that the runtime does not run: described, and its golden input run."""

    def run(shop: Workshop, data: bytes) -> None:
        with shop.altered(shop.bundle(layout), MANIFEST, data) as folder, ours_or_right():
            bundle = Bundle.open(folder)
            describe(bundle, Console(file=io.StringIO()))
            probe_bundle(bundle, "cpu", Console(file=io.StringIO()))

    name = f"valid vlmport.json, {layout}"
    return Target(name, lambda shop: valid_manifests(shop.bundle(layout)), run)


def manifests(shop: Workshop) -> st.SearchStrategy[bytes]:
    return json_texts(document(shop.bundle() / MANIFEST))


def valid_manifests(bundle: Path) -> st.SearchStrategy[bytes]:
    """Manifests that the schema takes, and that say what is not so."""
    return still_valid(document(bundle / MANIFEST), schema_takes).map(written)


@functools.cache
def validator() -> Callable[[Any], Any]:
    return fastjsonschema.compile(json.loads(SCHEMA.read_text(encoding="utf-8")))


def schema_takes(raw: Any) -> bool:
    try:
        validator()(raw)
    except fastjsonschema.JsonSchemaValueException:
        return False
    return True


def prompter_file(name: str) -> Target:
    """A bundle's tokenizer file; sizes in the manifest are not the point here."""

    def inputs(shop: Workshop) -> st.SearchStrategy[bytes]:
        if name.endswith(".jinja"):
            return st.one_of(damaged((shop.bundle() / name).read_bytes()), templates())
        return json_texts(document(shop.bundle() / name))

    def run(shop: Workshop, data: bytes) -> None:
        spec = Bundle.open(shop.bundle()).manifest.prompt
        with shop.altered(shop.bundle(), name, data) as folder:
            if name.endswith(".jinja"):  # the template that counts stands in the other file
                config = document(folder / "tokenizer_config.json")
                del config["chat_template"]
                (folder / "tokenizer_config.json").unlink()
                (folder / "tokenizer_config.json").write_bytes(written(config))
            with ours_or_right(), mock.patch.object(chat_template.WORKER, "seconds", 0.5):
                prompter = Prompter(folder, spec)
                ids = prompter.encode(prompter.render(spec.caption))
                prompter.splice(ids, [np.zeros(25, np.int64)])
                prompter.tokenizer.decode([0, 1, 2, 10**6])

    return Target(f"bundle's {name}", inputs, run)


def inspect_graph(shop: Workshop, data: bytes) -> None:
    """A graph of a bundle, with damage anywhere."""
    file = shop.folder / "graph.onnx"
    file.write_bytes(data)
    with ours_or_right():
        describe_onnx(file, Console(file=io.StringIO()))


def graphs(shop: Workshop) -> st.SearchStrategy[bytes]:
    return damaged((shop.bundle() / GRAPH).read_bytes())


# Pictures


def open_picture(shop: Workshop, data: bytes) -> None:
    with ours_or_right():
        rgb = open_image(data)
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3
        assert rgb.shape[2] == 3
        assert 0 < rgb.shape[0] * rgb.shape[1] <= MAX_PIXELS
        assert max(rgb.shape) <= MAX_SIDE


@dataclass(frozen=True)
class Target:
    """A kind of input and what is done with it."""

    name: str
    inputs: Callable[[Workshop], st.SearchStrategy[Any]]
    run: Callable[[Workshop, Any], None]


TARGETS = (
    exported_file("config.json"),
    exported_file("tokenizer.json"),
    exported_file("tokenizer_config.json"),
    exported_file("special_tokens_map.json"),
    exported_file("preprocessor_config.json"),
    exported_file("generation_config.json"),
    exported_file("adapter_config.json", adapter=True),
    read_file("idefics3", "config.json"),
    read_file("idefics3", "preprocessor_config.json"),
    read_file("qwen2.5", "config.json"),
    read_file("qwen2.5", "preprocessor_config.json"),
    read_file("qwen3", "config.json"),
    read_file("qwen3", "processor_config.json"),
    Target("model.safetensors", safetensors, read_weights),
    Target(INDEX, indices, read_shards),
    Target(MANIFEST, manifests, run_bundle),
    Target("valid vlmport.json", lambda shop: valid_manifests(shop.bundle()), run_bundle),
    probe_manifest(COMPONENTS),
    probe_manifest(FUSED),
    probe_manifest(GENAI),
    prompter_file("tokenizer.json"),
    prompter_file("tokenizer_config.json"),
    prompter_file("chat_template.jinja"),
    Target("ONNX file", graphs, inspect_graph),
    Target("picture", lambda shop: damaged_pictures(), open_picture),
    # Not bad input but any: `make test` draws the same always, other draws belong here.
    Target(
        "decoding options",
        lambda shop: st.tuples(requests(), tables()),
        lambda shop, drawn: compare_if_any(*drawn),
    ),
)
# In a process of its own only: it forks.
COMMAND_LINE = Target("command line", commands.cases, commands.run_command)
