"""The ladder of each layout, by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmport.bundle import Bundle
from vlmport.parity.asked import Request
from vlmport.parity.judging import Progress
from vlmport.parity.ladders.base import Ladder, climb_all
from vlmport.parity.ladders.components import FourFilesLadder
from vlmport.parity.ladders.fused import FusedLadder
from vlmport.parity.ladders.genai import GenaiLadder
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.protocol import Reference
from vlmport.parity.report import Row

LADDERS: Mapping[str, type[Ladder[Any, Any]]] = {
    ladder.layout: ladder for ladder in (HubLadder, FourFilesLadder, FusedLadder, GenaiLadder)
}


def run_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """Climb the ladder of the bundle's layout for every precision and every request.

    Args:
        progress: called before and after each rung with (done rungs, all rungs, what is next).

    Raises SourceError for a reference of another kind of model.
    """
    ladder = LADDERS[bundle.manifest.layout]
    return climb_all(ladder, reference, bundle, precisions, requests, progress)
