"""Answers of built-in models under many decoding options, for the web runtime to equal in Node."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmport.bundle import Bundle
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.model import VLM
from vlmport.runtime.response import Answer

IMAGES = ("red_square.png", "yellow_circle.png")
QUESTION = "what color is the square?"

# Of each model: the precisions that are tried.
PRECISIONS = {"shapes": ("fp32", "q8", "q4"), "shapes-smolvlm": ("fp32", "q8")}

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 5, "num_return_sequences": 2, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 12},
    {"num_beams": 3, "do_sample": True, "seed": 5, "temperature": 1.8, "num_return_sequences": 3},
    {"do_sample": True, "seed": 1, "temperature": 2.0},
    {"do_sample": True, "seed": 2, "temperature": 2.5, "num_return_sequences": 3, "top_p": 0.9},
    {"do_sample": True, "seed": 3, "temperature": 3.0, "min_p": 0.01, "top_k": 0, "logprobs": 2},
    {"do_sample": True, "seed": 4, "temperature": 3.0, "typical_p": 0.8, "max_new_tokens": 5},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "min_new_tokens": 15},
    {"stop_strings": [" square", " circle"]},
    {"stop_strings": "o", "num_beams": 2},
    {"suppress_tokens": [5, 6, 7, 8], "begin_suppress_tokens": [9, 10, 11], "logprobs": 0},
    {"max_new_tokens": 3, "forced_eos_token_id": 1},
    {"exponential_decay_length_penalty": [2, 3.0], "skip_special_tokens": False},
    {"min_new_tokens": 60, "max_new_tokens": 60, "prompt_lookup_num_tokens": 10},
)


def decodings(bundles: Mapping[str, Bundle], folder: Path) -> dict[str, Any]:
    """Images as pixels, and what Python answers."""
    images = {}
    for name in IMAGES:
        rgb = open_image(folder / name)
        height, width, _ = rgb.shape
        data = base64.b64encode(rgb.tobytes()).decode()
        images[name] = {"width": width, "height": height, "data": data}
    cases = [
        case
        for model, precisions in PRECISIONS.items()
        for precision in precisions
        for case in _cases(bundles[model], model, precision, folder)
    ]
    return {"images": images, "cases": cases}


def _cases(bundle: Bundle, model: str, precision: str, folder: Path) -> list[dict[str, Any]]:
    asks = model != "shapes"
    found = []
    with VLM.open(bundle, precision=precision) as vlm:
        for n, options in enumerate(OPTIONS):
            if precision == "q8" and "prompt_lookup_num_tokens" in options:
                continue  # refused there
            image = IMAGES[n % len(IMAGES)]
            messages = vlm.components.manifest.prompt.caption
            if asks:
                parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
                messages = [{"role": "user", "content": parts}]
            response = vlm.generate(messages, [folder / image], **options)
            case = {"model": model, "precision": precision, "image": image, "options": options}
            answers = [_answer(one) for one in (response, *response.alternatives)]
            found.append({**case, "messages": messages, "answers": answers})
    return found


def _answer(answer: Answer) -> dict[str, Any]:
    logprobs = answer.logprobs and [
        {"token": one.token, "logprob": one.logprob, "top": one.top} for one in answer.logprobs
    ]
    return {
        "text": answer.text,
        "tokenIds": answer.token_ids,
        "stopReason": answer.stop_reason,
        "score": answer.score,
        "logprobs": logprobs,
    }
