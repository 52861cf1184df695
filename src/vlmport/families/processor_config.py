"""Read the settings of a checkpoint's image processor, saved by any version of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def read_image_processor(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """Return the settings, and the name of their place for errors.

    transformers 5 writes them into processor_config.json, and reads them there first; 4 writes
    preprocessor_config.json. Raises ConfigError if neither has them.
    """
    where, raw = f"{PROCESSOR}: image_processor", checkpoint.json(PROCESSOR) or {}
    if "image_processor" in raw:
        raw = raw["image_processor"]
    else:
        where, raw = PREPROCESSOR, checkpoint.json(PREPROCESSOR)
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{checkpoint.folder}: no {PREPROCESSOR}, and no image_processor in {PROCESSOR}",
            hint="save the processor too: AutoProcessor.from_pretrained(…).save_pretrained(folder)",
            code="checkpoint.no-image-processor",
        )
    return raw, where
