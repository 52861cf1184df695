"""How long a picture takes by its size: preprocessing and the vision encoder, at each precision.

    python benchmarks/encode.py BUNDLE [--pictures 224x224,448x448] [--precisions q8,q4]
    python benchmarks/encode.py qwen2_5_vl | qwen3_vl [--torch fp32,bf16] [--small]

BUNDLE is a folder that vlmport exported. The two names stand for towers of the real size (those of
Qwen2.5-VL-3B and Qwen3-VL-2B) with random weights, of which torch's time can be given beside ours;
their language models are cut to as few layers as they go with. Pictures of 256, 1,024 and 4,096
patches are taken where none are named. Figures are taken in turn, and medians are given. Prints a
table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlmport.benchmark.machine import describe_machine, interleaved, median, milliseconds
from vlmport.benchmark.picture import gradient
from vlmport.bundle import Bundle
from vlmport.exporter import export
from vlmport.runtime.graphs.components import Components

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkpoint writers are the tests'

from tests.qwen_checkpoints import write_qwen2_5, write_qwen3  # noqa: E402

PACKAGES = ("vlmport", "onnxruntime", "torch", "transformers")
SIDES = (16, 32, 64)  # of a picture, in patches
LARGEST = 64 * 64 * 16 * 16  # pixels
TEXT = {
    "hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 256,
}  # fmt: skip
ROPE_2_5 = {"type": "mrope", "mrope_section": [16, 24, 24]}
ROPE_3 = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
VISION_2_5 = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
VISION_3 = {
    "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096,
    "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
LAYERS_3 = len(VISION_3["deepstack_visual_indexes"])  # the fewest that take so many lanes


def write_qwen2_5_vl(folder: Path, *, small: bool) -> int:
    """A checkpoint with this tower; returns the side of a patch in pixels."""
    cut = {"depth": 2, "fullatt_block_indexes": [1]} if small else {}
    write_qwen2_5(
        folder,
        dtype="BF16",
        vision=VISION_2_5 | cut,
        text={**TEXT, "rope_scaling": ROPE_2_5},
        pixels={"min_pixels": 4 * 28 * 28, "max_pixels": LARGEST},
    )
    return 14


def write_qwen3_vl(folder: Path, *, small: bool) -> int:
    """A checkpoint with this tower; returns the side of a patch in pixels."""
    cut = {"depth": 2, "deepstack_visual_indexes": [0]} if small else {}
    write_qwen3(
        folder,
        dtype="BF16",
        vision=VISION_3 | cut,
        text={**TEXT, "num_hidden_layers": LAYERS_3, "rope_scaling": ROPE_3},
        pixels={"size": {"shortest_edge": 4 * 32 * 32, "longest_edge": LARGEST}},
    )
    return 16


WRITERS = {"qwen2_5_vl": write_qwen2_5_vl, "qwen3_vl": write_qwen3_vl}


def torch_encoders(checkpoint: Path, names: list[str], threads: int) -> dict[str, Any]:
    """Name → what encodes the inputs of a picture, by transformers' own code."""
    if not names:
        return {}
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(threads)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def encoder(name: str) -> Callable[[dict[str, np.ndarray]], None]:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtypes[name]).eval()

        def encode(inputs: dict[str, np.ndarray]) -> None:
            given = {key: torch.from_numpy(value) for key, value in inputs.items()}
            given["pixel_values"] = given["pixel_values"].to(dtypes[name])
            with torch.inference_mode():
                model.get_image_features(**given)

        return encode

    return {f"torch {name}": encoder(name) for name in names}


def measure(
    bundle: Bundle,
    pictures: list[tuple[int, int]],
    precisions: list[str],
    torch: dict[str, Any],
    threads: int,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Engine → figure → median; figures end in '@' and the number of patches (or images)."""
    ours = {
        f"vlmport {name}": Components.open(bundle, precision=name, threads=threads)
        for name in precisions
    }
    calls: dict[tuple[str, str], Callable[[], float]] = {}
    for width, height in pictures:
        picture = gradient(width, height)
        for name, one in ours.items():
            inputs = one.process_image(picture).inputs
            pixels = inputs["pixel_values"]  # [N, patch], or images of a fixed size
            count = len(pixels) if pixels.ndim == 2 else int(np.prod(pixels.shape[:-3]))
            calls[name, f"image_ms@{count}"] = lambda one=one, picture=picture: milliseconds(
                lambda: one.process_image(picture)
            )
            calls[name, f"encode_ms@{count}"] = lambda one=one, inputs=inputs: milliseconds(
                lambda: one.encode_image(inputs)
            )
        for name, encode in torch.items():
            calls[name, f"encode_ms@{count}"] = lambda encode=encode, inputs=inputs: milliseconds(
                lambda: encode(inputs)
            )
    interleaved(calls, 1)  # not counted
    figures: dict[str, dict[str, float]] = {name: {} for name in (*ours, *torch)}
    for (name, figure), values in interleaved(calls, rounds).items():
        figures[name][figure] = round(median(values), 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a bundle's folder, or " + " or ".join(WRITERS))
    parser.add_argument("--pictures", help="sizes such as 640x480, with commas")
    parser.add_argument("--precisions", default="q8")
    parser.add_argument("--torch", default="", help="fp32, bf16: of the random models alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="2 layers, to try the script out")
    arguments = parser.parse_args()
    precisions = arguments.precisions.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder, side, torch = Path(temporary), 14, {}
        if arguments.model in WRITERS:
            side = WRITERS[arguments.model](folder / "checkpoint", small=arguments.small)
            bundle = export(folder / "checkpoint", folder / "bundle", precisions=precisions)
            names = [name for name in arguments.torch.split(",") if name]
            torch = torch_encoders(folder / "checkpoint", names, arguments.threads)
        else:
            bundle = Bundle.open(arguments.model)
        named = arguments.pictures or ",".join(f"{n * side}x{n * side}" for n in SIDES)
        pictures = [tuple(map(int, one.split("x"))) for one in named.split(",")]
        figures = measure(bundle, pictures, precisions, torch, arguments.threads, arguments.rounds)
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    print(f"{'':18}" + "".join(f"{name:>18}" for name in columns))
    for name, row in figures.items():
        cells = (f"{row[column]:18.1f}" if column in row else f"{'-':>18}" for column in columns)
        print(f"{name:18}{''.join(cells)}")
    settings = {"model": arguments.model, "rounds": arguments.rounds, "small": arguments.small}
    report = {
        "benchmark": f"encode, {Path(arguments.model).name}",
        "machine": describe_machine(arguments.threads, PACKAGES),
        "settings": settings,
        "figures": figures,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
