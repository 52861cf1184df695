"""Export a checkpoint to a bundle: written graphs, streamed weights, no torch."""

from __future__ import annotations

from vlmport.exporter.exporter import Progress, export

__all__ = ["Progress", "export"]
