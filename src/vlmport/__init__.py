"""Export small vision-language models to ONNX, prove the export right, run it anywhere.

    import vlmport

    model = vlmport.load("shapes")
    print(model.caption("examples/red_square.png"))

    bundle = vlmport.export("my-finetune", "my-bundle")
    report = vlmport.verify(bundle, "my-finetune")

Everything below is imported when it is first used: `import vlmport` is instant.
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
    from vlmport.bundle import Bundle
    from vlmport.errors import VlmportError
    from vlmport.evaluation import evaluate
    from vlmport.exporter import export
    from vlmport.loading import builtin_models, load
    from vlmport.parity import Report, verify
    from vlmport.runtime.conversation import Conversation
    from vlmport.runtime.model import VLM, Caption

__all__ = [
    "VLM",
    "Bundle",
    "Caption",
    "Conversation",
    "Report",
    "VlmportError",
    "__version__",
    "builtin_models",
    "evaluate",
    "export",
    "load",
    "verify",
]

_HOMES = {
    "VLM": "vlmport.runtime.model",
    "Bundle": "vlmport.bundle",
    "Caption": "vlmport.runtime.model",
    "Conversation": "vlmport.runtime.conversation",
    "Report": "vlmport.parity",
    "VlmportError": "vlmport.errors",
    "builtin_models": "vlmport.loading",
    "evaluate": "vlmport.evaluation",
    "export": "vlmport.exporter",
    "load": "vlmport.loading",
    "verify": "vlmport.parity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmport' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
