"""Conversations as Python has them, for the browser to have the same (web/browser/support.ts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmport.bundle import Bundle
from vlmport.runtime.model import VLM
from vlmport.runtime.response import Caption

Turn = tuple[str | None, tuple[str, ...]]  # a question, or none for a caption; names of pictures
SYSTEM = "Answer in one word."
TURNS: tuple[Turn, ...] = (
    ("What is it?", ("rgb.png",)),
    ("Where?", ()),
    (None, ("tall.png",)),
    ("Which of these?", ("subsampled.jpg", "rgb.png")),
)
ALONE: tuple[Turn, ...] = (("Name a color.", ()), ("And one more?", ()))
PICTURES = ("rgb.png", "tall.png", "subsampled.jpg")
TOKENS = 12
ASKED = ("fp32", "q8", "q4")

# Of the examples, to a model that is trained on such.
QUESTIONS: tuple[Turn, ...] = (
    ("what color is the square?", ("red_square.png",)),
    ("how many shapes are there?", ()),
    (None, ("yellow_circle.png",)),
)


def told(answer: Caption) -> dict[str, Any]:
    return {
        "tokens": answer.token_ids,
        "text": answer.text,
        "counts": {
            "promptTokens": answer.counts["prompt_tokens"],
            "cachedTokens": answer.counts["cached_tokens"],
            "imageTokens": answer.counts["image_tokens"],
            "newTokens": answer.counts["new_tokens"],
        },
    }


def talk(
    vlm: VLM,
    folder: Path,
    turns: Sequence[Turn],
    system: str | None = SYSTEM,
    tokens: int | None = TOKENS,
) -> list[dict[str, Any]]:
    """A conversation, turn by turn; `tokens` None: as long as the answers are."""
    chat = vlm.conversation(system)
    found = []
    for question, names in turns:
        images = [folder / name for name in names]
        answer = chat.ask(question, images, **({"max_new_tokens": tokens} if tokens else {}))
        found.append({"question": question, "pictures": names, **told(answer)})
    return found


def messages(
    vlm: VLM, folder: Path, names: Sequence[str], tokens: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """One prompt of several turns and pictures, under options of the image processor; a turn spells
    the placeholder of an image, and special tokens are kept."""
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    asked = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": content},
        {"role": "assistant", "content": f"Two {vlm.prompter.spec.image_placeholder}."},
        {"role": "user", "content": [{"type": "text", "text": "Larger?"}, {"type": "image"}]},
    ]
    images = [folder / name for name in names]
    limit: dict[str, Any] = {"max_new_tokens": tokens} if tokens else {}
    limit["skip_special_tokens"] = False
    answer = vlm.generate(asked, images, image_options=options, **limit)
    return {"messages": asked, "pictures": names, "imageOptions": dict(options), **told(answer)}


def precisions(bundle: Bundle) -> list[str]:
    return [name for name in ASKED if name in bundle.manifest.precisions]


def talks(bundle: Bundle, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Precision → what was said, of all precisions that are asked for in the browser."""
    found = {}
    for precision in precisions(bundle):
        with VLM.open(bundle, precision=precision) as vlm:
            found[precision] = {
                "turns": talk(vlm, folder, TURNS),
                "alone": talk(vlm, folder, ALONE),
                "messages": messages(vlm, folder, PICTURES, TOKENS, options),
            }
    return {"folder": "kinds", "system": SYSTEM, "maxNewTokens": TOKENS, "said": found}


def trained_talks(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """The same of a model that is trained: its answers are right, and as long as they are."""
    found = {}
    for precision in precisions(bundle):
        with VLM.open(bundle, precision=precision) as vlm:
            turns = talk(vlm, folder, QUESTIONS, None, None)
            assert turns[0]["text"].strip() == "red", turns[0]["text"]
            names = ("red_square.png", "yellow_circle.png", "red_square.png")
            found[precision] = {
                "turns": turns,
                "alone": [],
                "messages": messages(vlm, folder, names, None, {}),
            }
    return {"folder": "pictures", "system": None, "maxNewTokens": None, "said": found}
