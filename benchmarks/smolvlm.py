"""SmolVLM-256M-Instruct as benchmarks run it: its real sizes, random weights, real names.

The sizes are those of its config.json. With its tokenizer (`--tokenizer`, a folder) the prompt
about a picture of 12 tiles has 876 tokens; the stand-in of the tests, which is taken without one,
spells words in letters and comes to a few more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from workload import Workload, write_llama, write_workload

from vlmport.exporter import export

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkpoint writer is the tests'

from tests.idefics3_checkpoints import write_idefics3_checkpoint  # noqa: E402

MARKERS = 6  # rows and columns of tiles that the tokenizer has names for
QUESTION = "Describe this image in detail."
PICTURE = (960, 686)  # 3 rows of 4 tiles, and the whole picture once more
WHOLE = {"do_image_splitting": False}
NEW_TOKENS = 64


class Size(NamedTuple):
    vision: dict[str, Any]
    text: dict[str, Any]


REAL = Size(
    vision={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "image_size": 512, "patch_size": 16,
    },
    text={
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
        "vocab_size": 49280, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    },
)  # fmt: skip
SMALL = Size(REAL.vision | {"num_hidden_layers": 2}, REAL.text | {"num_hidden_layers": 2})


def write_smolvlm(folder: Path, size: Size, tokenizer: Path | None = None) -> Path:
    """A checkpoint of that size: tiles of 512 pixels, 64 tokens each, an untied head."""
    return write_idefics3_checkpoint(
        folder,
        dtype="BF16",
        markers=MARKERS,
        tokenizer=tokenizer,
        vision=size.vision,
        text=size.text,
        config={"scale_factor": 4},
        pixels={"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}},
    )


def write_model(
    folder: Path, precisions: str, *, small: bool, tokenizer: Path | None = None
) -> Workload:
    """The folder that `workload.py` describes: one tile, and a request about 13."""
    checkpoint = write_smolvlm(folder / "checkpoint", SMALL if small else REAL, tokenizer)
    write_llama(checkpoint, folder / "llama", "model.text_model.", "model.")
    bundle = export(checkpoint, folder / "bundle", precisions=precisions)
    pictures: dict[tuple[int, int], dict[str, Any]] = {(512, 512): WHOLE, PICTURE: {}}
    return write_workload(
        folder, bundle, pictures, question=QUESTION, lengths=(), new_tokens=NEW_TOKENS
    )
