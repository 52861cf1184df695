"""The runtime follows bundles: it may not know families, nor bring torch along."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = (
    "torch",
    "transformers",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "jaxtyping",
    "vlmport.families",
    "vlmport.graph",
    "vlmport.exporter",
    "vlmport.checkpoint",
    "vlmport.parity",
)

PROGRAM = """
import importlib, pkgutil, sys
import vlmport.runtime
for module in pkgutil.walk_packages(vlmport.runtime.__path__, "vlmport.runtime."):
    importlib.import_module(module.name)
print("\\n".join(sys.modules))
"""


def test_no_module_of_the_runtime_imports_the_exporter_or_torch():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "vlmport.runtime.model" in loaded
    bad = [
        name
        for name in loaded
        if any(name == one or name.startswith(f"{one}.") for one in FORBIDDEN)
    ]
    assert not bad
