"""Graphs whose weights are packed largest first: what the golden probe opens takes less memory.

When a session opens, ONNX Runtime packs the constant matrices node by node, in the order of the
file, and holds a matrix twice while it does. A decoder's head is its largest matrix and its last
node, so it is held twice on top of all that is packed by then. Listed first, it is packed while
there is nothing else: 2,780 MB to open 3 billion weights of 4 bits, 2,963 as exported.

ONNX wants nodes after those that they read; ONNX Runtime sorts them by itself before it runs
anything. So such a copy is never shipped, and computes what the shipped graph computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import PurePosixPath

import onnx

from vlmport.bundle import ANY, Bundle, Variant
from vlmport.runtime.graphs.sessions import open_session

PREFIX = ".largest-first-"


@contextlib.contextmanager
def largest_first(bundle: Bundle, precision: str) -> Iterator[Bundle]:
    """The bundle with temporary copies of those graphs at a precision that keep weights beside.

    The copies are graphs alone, on the same files of weights, and are deleted at the end.
    Raises BundleError where ONNX Runtime can't open a graph as it is shipped.
    """
    with contextlib.ExitStack() as copies:

        def swapped(variant: Variant) -> Variant:
            if not variant.data:
                return variant
            open_session(bundle.path(variant.model), low_memory=True)
            copy = str(PurePosixPath(variant.model).with_name(_copy_name(variant.model)))
            copies.callback(bundle.path(copy).unlink, missing_ok=True)
            model = onnx.load(bundle.path(variant.model), load_external_data=False)
            list_largest_first(model)
            onnx.save(model, bundle.path(copy))
            return dataclasses.replace(variant, model=copy)

        components = {
            name: {
                form: swapped(variant) if form in (precision, ANY) else variant
                for form, variant in forms.items()
            }
            for name, forms in bundle.manifest.components.items()
        }
        manifest = dataclasses.replace(bundle.manifest, components=components)
        yield dataclasses.replace(bundle, manifest=manifest)


def list_largest_first(model: onnx.ModelProto) -> None:
    """Order the nodes by the weights that they read, in place; those without keep their order."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    model.graph.node.sort(
        key=lambda node: max((sizes.get(name, 0) for name in node.input), default=0), reverse=True
    )


def _copy_name(model: str) -> str:
    return PREFIX + PurePosixPath(model).name
