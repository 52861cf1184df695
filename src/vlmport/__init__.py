"""Export small vision-language models to ONNX, verify the export, and run it anywhere.

    import vlmport

    model = vlmport.load("shapes")
    print(model.caption("examples/red_square.png"))

    bundle = vlmport.export("my-finetune", "my-bundle")
    report = vlmport.verify(bundle, "my-finetune")

Functions: `load`, `export`, `verify`, `evaluate`, `builtin_models`. Classes: `VLM` (a model that is
open), `Conversation`, `Response`, `GenerationOptions`, `Bundle`, `Report`. Errors are in
`vlmport.errors`; the most common ones are here too.

Each name is imported when it is first used: `import vlmport` alone is instant.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Libraries that report their use when they are first imported: not here, unless the user has said
# otherwise (docs/privacy.md). ONNX Runtime writes a device id into the home folder, and sends.
NO_REPORTS = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
REPORTS_BY_CHOICE = os.environ.get(NO_REPORTS[0], "1") != "1"
for _name in NO_REPORTS:
    os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from vlmport import errors
    from vlmport.bundle import Bundle
    from vlmport.errors import (
        BundleError,
        DependencyError,
        DeviceError,
        ExportError,
        ImageError,
        OptionError,
        PromptError,
        SourceError,
        VlmportError,
        VlmportWarning,
    )
    from vlmport.evaluation import evaluate
    from vlmport.exporter import export
    from vlmport.loading import builtin_models, load
    from vlmport.parity import Report, verify
    from vlmport.runtime.conversation import Conversation
    from vlmport.runtime.decoding.generate_options import GenerateOptions
    from vlmport.runtime.decoding.options import GenerationOptions
    from vlmport.runtime.model import VLM
    from vlmport.runtime.response import Caption, Response

__all__ = [
    "VLM",
    "Bundle",
    "BundleError",
    "Caption",
    "Conversation",
    "DependencyError",
    "DeviceError",
    "ExportError",
    "GenerateOptions",
    "GenerationOptions",
    "ImageError",
    "OptionError",
    "PromptError",
    "Report",
    "Response",
    "SourceError",
    "VlmportError",
    "VlmportWarning",
    "__version__",
    "builtin_models",
    "errors",
    "evaluate",
    "export",
    "load",
    "verify",
]

# Name → the module that defines it.
_HOMES = {
    "VLM": "vlmport.runtime.model",
    "Bundle": "vlmport.bundle",
    "Caption": "vlmport.runtime.response",
    "Conversation": "vlmport.runtime.conversation",
    "GenerateOptions": "vlmport.runtime.decoding.generate_options",
    "GenerationOptions": "vlmport.runtime.decoding.options",
    "Report": "vlmport.parity",
    "Response": "vlmport.runtime.response",
    "builtin_models": "vlmport.loading",
    "evaluate": "vlmport.evaluation",
    "export": "vlmport.exporter",
    "load": "vlmport.loading",
    "verify": "vlmport.parity",
}
_HOMES |= {name: "vlmport.errors" for name in __all__ if name.endswith(("Error", "Warning"))}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("vlmport.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmport' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
