"""What the ladders of the other layouts share: prompts, closeness, and the order of runs.

S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle
from vlmport.runtime.prompt import Prompter, check_messages
from vlmport.verify import metrics
from vlmport.verify.judging import Found, Progress
from vlmport.verify.report import Row
from vlmport.verify.requests import Request
from vlmport.verify.truth import Truth

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Of one precision: number of the request → its rows.
Climb = Callable[[int], Iterator[Row]]


def bundle_prompt(
    bundle: Bundle, request: Request, pictures: Sequence[Int[np.ndarray, " T"]]
) -> Int[np.ndarray, " S"]:
    """The ids of a prompt as the bundle's template and tokenizer make them.

    Args:
        pictures: the ids of each picture. Raises as the runtime does.
    """
    spec = bundle.manifest.prompt
    images = [picture.rgb for picture in request.pictures]
    chat = check_messages(spec.caption if request.is_caption else request.messages, images)
    prompter = Prompter(bundle.folder, spec)
    return prompter.splice(prompter.encode(prompter.render(chat.messages)), list(pictures))


def prompt_found(found: Found, ours: Int[np.ndarray, " S"], truth: Int[np.ndarray, " P"]) -> Found:
    """What was found of the tokens, and how many ids of the prompt differ."""
    values, detail = found
    if wrong := metrics.unequal(ours, truth):
        told = f"a prompt of {len(ours)} tokens, expected {len(truth)}; {wrong} ids differ"
        detail = f"{told}; {detail}" if detail else told
    return values | {"prompt": wrong}, detail


def closeness(
    ours: Float[np.ndarray, "S V"], truth: Float[np.ndarray, "S V"], tail: int = 0
) -> Found:
    """How far rows are apart by every measure; of the last `tail` rows as logits too."""
    values: dict[str, float] = {
        "worst": metrics.worst_error(ours, truth),
        "typical": metrics.typical_error(ours, truth),
        "cosine": metrics.least_cosine(ours, truth),
    }
    if tail:
        values["kl"] = metrics.mean_divergence(ours[-tail:], truth[-tail:])
        values["top1"] = metrics.agreement(ours[-tail:], truth[-tail:])
    return values, None


def told_truths(
    requests: Sequence[Request], make: Callable[[Request], Truth], tell: Progress
) -> list[Truth]:
    """The truth of each request, told as it goes."""
    truths = []
    for request in requests:
        tell(0, 0, f"reference, {request.name}")
        truths.append(make(request))
    return truths


def climb_all(
    precisions: Sequence[str],
    requests: Sequence[Request],
    rungs: Sequence[str],
    open_at: Callable[[str], AbstractContextManager[Climb]],
    tell: Progress,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request, one precision at a time."""
    total, rows = len(rungs) * len(requests) * len(precisions), []
    for precision in precisions:
        with open_at(precision) as climb:
            for number, request in enumerate(requests):
                tell(len(rows), total, f"{precision}, {request.name}")
                for row in climb(number):
                    rows.append(row)
                    tell(len(rows), total, f"{precision}, {request.name}")
    return tuple(rows)
