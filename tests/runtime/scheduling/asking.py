"""What tests of the scheduler share: requests, and what their events say together."""

from __future__ import annotations

from typing import Any

from vlmport.runtime.response import Answer, Response
from vlmport.runtime.scheduling import Finished, Job, Piece

WAIT = 20  # seconds; no test waits as long


def question(text: str = "or", images: int = 0) -> list[dict[str, Any]]:
    parts = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def facts(response: Response) -> list[tuple[Any, ...]]:
    """All that a response says about its answers; no times and counts."""
    answers: tuple[Answer, ...] = (response, *response.alternatives)
    return [
        (one.text, one.token_ids, one.stop_reason, one.score, one.logprobs, one.complete)
        for one in answers
    ]


def pieces(job: Job) -> list[Piece]:
    """The pieces of a job that ended; the last event is the end."""
    *before, last = job.events(WAIT)
    assert isinstance(last, Finished)
    found = [event for event in before if isinstance(event, Piece)]
    assert len(found) == len(before)
    return found


def check_pieces(job: Job) -> None:
    """The pieces of each sequence are together what the response says."""
    found, response = pieces(job), job.result(WAIT)
    for n, answer in enumerate((response, *response.alternatives)):
        own = [piece for piece in found if piece.sequence == n]
        assert "".join(piece.text for piece in own) == answer.text
        assert sum((piece.token_ids for piece in own), ()) == answer.token_ids
        if answer.logprobs is None:
            assert all(piece.logprobs is None for piece in own)
        else:
            assert sum((piece.logprobs or () for piece in own), ()) == answer.logprobs
        assert [piece.stop_reason for piece in own][-1] == answer.stop_reason
        assert all(piece.stop_reason is None for piece in own[:-1])
    assert {piece.sequence for piece in found} == set(range(1 + len(response.alternatives)))
