"""Break a copy of a bundle on purpose, so that only its numbers are wrong.

Sizes and hashes in the manifest are renewed: what `Bundle.open` would find is not the point here.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from vlmport.bundle import Bundle, Manifest, hash_folder, write_manifest

Edit = Callable[[np.ndarray], np.ndarray]


def copied(bundle: Bundle, folder: Path) -> Bundle:
    """A copy in `folder`."""
    shutil.copytree(bundle.folder, folder)
    return Bundle.open(folder)


def renewed(bundle: Bundle, change: Callable[[Manifest], Manifest] = lambda m: m) -> Bundle:
    """The bundle with `change` made to its manifest, and the entries of all files renewed."""
    manifest = change(dataclasses.replace(bundle.manifest, files=hash_folder(bundle.folder)))
    write_manifest(bundle.folder, manifest)
    return Bundle.open(bundle.folder, check_hashes=True)


def edit_graph(
    bundle: Bundle, component: str, change: Callable[[onnx.ModelProto], None], precision="fp32"
) -> Bundle:
    """Change one component's graph in place."""
    path = bundle.path(bundle.variant(component, precision).model)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return renewed(bundle)


def edit_tensor(bundle: Bundle, component: str, name: str, edit: Edit, precision="fp32") -> Bundle:
    """Change the one initializer whose name ends in `name`."""

    def change(model: onnx.ModelProto) -> None:
        found = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
        assert len(found) == 1, (name, [tensor.name for tensor in model.graph.initializer])
        value = edit(numpy_helper.to_array(found[0]).copy())
        found[0].CopyFrom(numpy_helper.from_array(value, found[0].name))

    return edit_graph(bundle, component, change, precision)


def swap_outputs(model: onnx.ModelProto, first: str, second: str) -> None:
    """Let each of two outputs carry the other's value."""
    other = {first: second, second: first}
    for node in model.graph.node:
        for names in (node.output, node.input):
            for at, name in enumerate(names):
                names[at] = other.get(name, name)


def append_to_output(model: onnx.ModelProto, name: str, operator: str, value: np.ndarray) -> None:
    """Let the output be `operator`(itself, value): needs no knowledge of the graph inside."""
    for node in model.graph.node:
        for names in (node.output, node.input):
            for at, one in enumerate(names):
                names[at] = f"true_{name}" if one == name else one
    model.graph.initializer.append(numpy_helper.from_array(value, "broken_by"))
    node = onnx.helper.make_node(operator, [f"true_{name}", "broken_by"], [name])
    model.graph.node.append(node)
