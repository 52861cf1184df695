"""Record the ladder's result in the bundle, without losing it where that can't be done."""

from __future__ import annotations

import dataclasses

from vlmport.bundle import Bundle
from vlmport.bundle.recording import write_result
from vlmport.errors import BundleError
from vlmport.parity.report import Report, parity_markdown


class UnrecordedError(BundleError):
    """The verification has its result, but it can't be written into the bundle.

    Attributes:
        report: the result.
    """

    def __init__(self, message: str, *, report: Report, code: str, hint: str | None = None):
        super().__init__(message, hint=hint, code=code)
        self.report = report


def record(bundle: Bundle, report: Report) -> Bundle:
    """Put a result into the model card and into vlmport.json.

    Raises UnrecordedError where the folder can't be written; then the bundle is as it was.
    """
    parity = report.to_json()
    manifest = dataclasses.replace(bundle.manifest, parity=parity)
    try:
        return write_result(bundle, manifest, {"parity": parity_markdown(parity)})
    except OSError as error:
        raise UnrecordedError(
            f"{bundle.folder}: the result can't be written into the bundle: "
            f"{error.strerror or error}",
            hint="is the folder read-only, or the disk full? --json FILE writes it elsewhere",
            report=report,
            code="bundle.unwritable",
        ) from error
