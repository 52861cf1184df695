"""Write weights.safetensors beside this file: linear layers as bitsandbytes saves them, and what it
makes of them again.

Run it with torch and bitsandbytes 0.50.2 installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb  # type: ignore[import-not-found]
import torch
from safetensors.torch import save_file

FILE = Path(__file__).with_name("weights.safetensors")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# name → outputs, inputs, type of the floats, options of Linear4bit
FOUR_BITS: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    "nf4": (40, 48, BFLOAT16, {"quant_type": "nf4", "compress_statistics": False}),
    "fp4": (33, 7, FLOAT32, {"quant_type": "fp4", "compress_statistics": False}),
    "nested": (160, 128, FLOAT16, {"quant_type": "nf4", "compress_statistics": True}),
    "stored_as_bf16": (
        24,
        64,
        BFLOAT16,
        {"quant_type": "nf4", "compress_statistics": True, "quant_storage": BFLOAT16},
    ),
}


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (outputs, inputs, dtype, options) in FOUR_BITS.items():
        values = torch.randn(outputs, inputs).to(dtype)
        layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, **options)
        layer = layer.to(dtype)
        layer.load_state_dict({"weight": values})
        layer = layer.to("cpu")
        weight = layer.weight
        plain = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        tensors[f"expected.{name}"] = plain
    layer = bnb.nn.Linear8bitLt(48, 40, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(40, 48).to(FLOAT16)})
    layer = layer.to("cpu")
    tensors |= {f"int8.{key}": value for key, value in layer.state_dict().items()}
    plain = bnb.functional.int8_vectorwise_dequant(tensors["int8.weight"], tensors["int8.SCB"])
    tensors["expected.int8"] = plain
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, FILE)


if __name__ == "__main__":
    main()
