"""Compare a bundle with Hugging Face transformers on PyTorch, rung by rung.

    report = verify("bundle", "checkpoint", console=Console())
    report.passed

docs/verification.md explains the rungs. torch, transformers and peft are imported by
`verify/reference.py` alone, and only once `verify` runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vlmport.builtin import builtin_folder
from vlmport.bundle import Bundle
from vlmport.checkpoint import locate, locate_adapter
from vlmport.errors import BundleError, DependencyError, SourceError
from vlmport.runtime.model import VLM
from vlmport.verify.ladder import run_ladder
from vlmport.verify.pictures import drawn_pictures, named_pictures
from vlmport.verify.protocol import Reference
from vlmport.verify.report import Measure, Report, Row, parity_markdown

if TYPE_CHECKING:
    from vlmport.runtime.images import ImageSource

__all__ = ["Measure", "Report", "Row", "parity_markdown", "verify"]

CARD = "README.md"
PARITY = re.compile(r"(<!-- parity -->\n).*?(\n?<!-- /parity -->)", re.DOTALL)


def verify(
    bundle: Bundle | str | Path,
    reference: str | Path,
    *,
    precisions: Sequence[str] | None = None,
    adapter: str | Path | None = None,
    images: Sequence[ImageSource] | None = None,
    console: Console | None = None,
) -> Report:
    """Run the parity ladder and write its result into vlmport.json and the model card.

    Args:
        reference: the checkpoint that the bundle was exported from: a folder, a Hub id or a
            built-in name.
        precisions: which to verify; None for all that the bundle holds.
        adapter: the PEFT folder that was merged at export, if one was.
        images: pictures beside the drawn ones, which are always there.
        console: where to print the report; None prints nothing.

    Returns the report, whether it passed or not. Raises:
        DependencyError: torch, transformers or peft is not installed.
        SourceError: the checkpoint is not found, or is that of another model.
        BundleError, ConfigError, WeightError, AdapterError, ImageError: as their names say.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    names = list(precisions or bundle.manifest.precisions)
    for name in names:
        bundle.manifest.choose(name)
    pictures = [*drawn_pictures(), *named_pictures(images or ())]
    truth = _load_reference(bundle, locate(builtin_folder(reference) or reference), adapter)
    _check_same_model(bundle, truth, reference)
    models = {name: VLM.open(bundle, precision=name) for name in names}
    try:
        rows = run_ladder(truth, models, pictures)
    finally:
        for model in models.values():
            model.close()
    report = Report(truth.versions, rows)
    record(bundle, report)
    if console is not None:
        report.print(console)
    return report


def record(bundle: Bundle, report: Report) -> Bundle:
    """Put a result into the model card, between its marks, and into vlmport.json.

    Raises BundleError where the folder can't be written.
    """
    parity = report.to_json()
    card = bundle.folder / CARD
    try:
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            table = parity_markdown(parity)
            card.write_text(PARITY.sub(lambda m: m[1] + table + m[2], text), encoding="utf-8")
        return bundle.with_parity(parity)
    except OSError as error:
        raise BundleError(
            f"{bundle.folder}: the result can't be written: {error}", hint="is it read-only?"
        ) from error


def _load_reference(bundle: Bundle, folder: Path, adapter: str | Path | None) -> Reference:
    """The reference side, imported now. Raises DependencyError without its packages."""
    try:
        from vlmport.verify.reference import load_reference
    except ImportError as error:
        raise DependencyError(
            f"verify needs PyTorch, transformers and peft: {error}",
            hint='pip install "vlmport[verify]"',
        ) from error
    return load_reference(
        folder,
        image_token_id=bundle.manifest.prompt.image_token_id,
        adapter=None if adapter is None else locate_adapter(adapter),
    )


def _check_same_model(bundle: Bundle, reference: Reference, source: str | Path) -> None:
    """Compare the decoder's sizes before anything runs. Raises SourceError naming all."""
    dims = bundle.manifest.dims
    wrong = [
        f"{name} is {size}, the bundle's {getattr(dims, name)}"
        for name, size in reference.dims.items()
        if size != getattr(dims, name)
    ]
    if wrong:
        raise SourceError(
            f"{source}: not the checkpoint that {bundle.folder} was exported from: "
            f"{'; '.join(wrong)}",
            hint="give the checkpoint that `vlmport export` was given",
        )
