"""Open the model that a command runs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from vlmport.cli.console import export_progress, say

if TYPE_CHECKING:
    from vlmport.runtime.model import VLM


def open_model(source: str, **options: Any) -> VLM:
    """Call `vlmport.load`, with a bar on stderr while a checkpoint is exported.

    A line on stderr says with which choices of `vlmport tune` the model runs.

    Raises as it does.
    """
    from vlmport.loading import load

    warnings.filterwarnings("ignore", module="PIL")  # an unreadable image is an error of ours
    with export_progress() as progress:
        model = load(source, progress=progress, **options)
    if model.tuning is not None:
        say(f"tuned: {model.tuning} (--no-tune ignores it)")
    return model
