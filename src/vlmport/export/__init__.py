"""Export a checkpoint to a bundle: written graphs, streamed weights, no torch."""

from __future__ import annotations

from vlmport.export.exporter import DEFAULT_PRECISIONS, Progress, export

__all__ = ["DEFAULT_PRECISIONS", "Progress", "export"]
