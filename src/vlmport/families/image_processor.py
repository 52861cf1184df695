"""The settings of a checkpoint's image processor, from wherever its transformers wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def read_image_processor(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """The settings, and what to call their place in errors.

    They are preprocessor_config.json; transformers 5 writes them into processor_config.json.
    Raises ConfigError where neither has them.
    """
    where, raw = PREPROCESSOR, checkpoint.json(PREPROCESSOR)
    if raw is None:
        where = f"{PROCESSOR}: image_processor"
        raw = (checkpoint.json(PROCESSOR) or {}).get("image_processor")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{checkpoint.folder}: no {PREPROCESSOR}, and no image_processor in {PROCESSOR}",
            hint="save the processor too: AutoProcessor.from_pretrained(…).save_pretrained(folder)",
        )
    return raw, where
