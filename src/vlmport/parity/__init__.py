"""Compare a bundle with Hugging Face transformers on PyTorch, rung by rung.

    report = verify("bundle", "checkpoint", console=Console())
    report.passed

A *reference* is the checkpoint in transformers. It makes *requests*, each a prompt with its images,
and its results for one request are a *truth*: pixels, features, embeddings, positions, logits and
tokens. A *ladder* compares the bundle with one truth. Each *rung* of it is one comparison, and is
fed the truth of the rung before, so that an error shows on its own rung and nowhere else. Only the
last rung runs the bundle alone. *Limits* say how far off a rung may be; the rows of all rungs are
the *report*, whose first broken rung has the cause.

Read in this order:

| module | question it answers |
| --- | --- |
| `__init__.py` (`verify`) | what are the steps? |
| `asked.py`, `pictures.py` | what is a request, and which images are there? |
| `protocol.py` | what does a reference have to answer? |
| `truth.py` | what are its results for one request? |
| `references/`, `families/*/reference.py` | how does transformers compute them? |
| `rungs.py` | what is a rung, in which order, and what breaks it? |
| `ladders/hub.py`, then `ladders/base.py` | how is the bundle run and compared on each rung? |
| `limits.py`, `metrics.py` | how far off may it be, and how is that measured? |
| `judging.py` | how are errors of the bundle and its tokens judged? |
| `rounding.py` | are the rounded weights those of fp32? |
| `report.py`, `recording.py` | how is the result shown and written into the bundle? |

docs/verification.md explains the rungs. Only `references/` and the families' `reference.py` import
torch, transformers and peft, and only once `verify` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
from rich.console import Console

from vlmport.builtin import builtin_folder, builtin_models
from vlmport.bundle import Bundle
from vlmport.checkpoint import locate, locate_adapter
from vlmport.errors import DependencyError, SourceError
from vlmport.loading import open_bundle
from vlmport.parity.judging import Progress
from vlmport.parity.ladders import run_ladder
from vlmport.parity.pictures import drawn_pictures, named_pictures
from vlmport.parity.protocol import Reference
from vlmport.parity.recording import UnrecordedError, record
from vlmport.parity.references import load_reference
from vlmport.parity.report import Measure, Report, Row, parity_markdown
from vlmport.parity.rounding import weight_rows

if TYPE_CHECKING:
    from vlmport.runtime.images.reading import ImageSource

__all__ = ["Measure", "Report", "Row", "UnrecordedError", "parity_markdown", "verify"]


def verify(
    bundle: Bundle | str | Path,
    reference: str | Path,
    *,
    precisions: Sequence[str] | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    images: Sequence[ImageSource] | None = None,
    console: Console | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with transformers on PyTorch, and write the result into the bundle.

        report = vlmport.verify("my-bundle", "my-finetune")
        report.passed

    The result goes into vlmport.json and the model card. It needs `pip install "vlmport[verify]"`.

    Args:
        bundle: a bundle, its folder, or a built-in name.
        reference: the checkpoint that the bundle was exported from: a folder, a Hub id or a
            built-in name.
        precisions: names of the precisions to verify; None (default) for all of the bundle.
        adapter: the PEFT folder or Hub id that was merged at export, if any.
        revision: branch, tag or commit of the reference, where it is a Hub id.
        images: images in addition to the drawn ones, as `VLM.caption` takes them.
        console: a rich console to print the report to; None prints nothing.
        progress: called with (done checks, all checks, what is next).

    Returns:
        The report, whether it passed or not.

    Raises:
        DependencyError: torch, transformers or peft is not installed, or another Pillow is.
        SourceError: the checkpoint is not found, or is that of another model.
        UnrecordedError: the checks are done and printed, but the bundle can't be written; its
            `report` has the result.
        VerificationError: transformers can't load or run the checkpoint, so nothing is known about
            the bundle.
        BundleError, ConfigError, WeightError, AdapterError, ImageError: a damaged or unsupported
            bundle, checkpoint, adapter or image.
    """
    bundle = open_bundle(bundle, precisions=precisions or ())
    names = list(precisions or bundle.manifest.precisions)
    for name in names:
        bundle.manifest.choose(name)
    _check_pillow(bundle.manifest.pixels.equals)
    pictures = [*drawn_pictures(), *named_pictures(images or ())]
    folder = locate(builtin_folder(reference) or reference, revision, known=builtin_models())
    truth = _load_reference(bundle, folder, adapter)
    _check_same_model(bundle, truth, reference)
    weights = tuple(row for name in names for row in weight_rows(bundle, name))
    ladder = run_ladder(truth, bundle, names, truth.requests(pictures), progress)
    report = Report(truth.versions, ladder + weights)
    if console is not None:
        report.print(console)
    record(bundle, report)
    return report


def _check_pillow(equals: str) -> None:
    """Raise DependencyError for another major version of Pillow than the manifest's.

    Pillow resizes the reference's images, and its arithmetic changes between major versions.
    """
    program, _, version = equals.partition(" ")
    major, installed = version.split(".")[0], PIL.__version__.split(".")[0]
    if program == "Pillow" and major != installed:
        raise DependencyError(
            f"the bundle's pixels equal those of Pillow {version}, installed is {PIL.__version__}, "
            f"which may resize otherwise",
            hint=f'pip install "pillow=={major}.*"',
            code="dependency.other-version",
        )


def _load_reference(bundle: Bundle, folder: Path, adapter: str | Path | None) -> Reference:
    """Import and load the reference. Raises DependencyError without its packages."""
    try:
        return load_reference(
            folder,
            image_token_id=bundle.manifest.prompt.image_token_id,
            adapter=None if adapter is None else locate_adapter(adapter),
            ignored={one for names in bundle.manifest.ignored_weights.values() for one in names},
        )
    except ImportError as error:
        raise DependencyError(
            f"verify needs PyTorch, transformers and peft: {error}",
            hint='pip install "vlmport[verify]"',
            code="dependency.missing",
        ) from error


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
            hint="give the checkpoint that the bundle was exported from",
            code="verify.other-checkpoint",
        )
