"""Record the ladder's result in the bundle, and keep it where the bundle can't be written."""

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
    """Write a result into the model card and into vlmport.json.

    Raises UnrecordedError where the folder can't be written; the bundle is then unchanged.
    """
    parity = report.to_json()
    manifest = dataclasses.replace(bundle.manifest, parity=parity)
    try:
        return write_result(bundle, manifest, {"parity": parity_markdown(parity)})
    except OSError as error:
        raise UnrecordedError(
            f"{bundle.folder}: the result can't be written into the bundle: "
            f"{error.strerror or error}",
            hint="check the rights of the folder and the free space, or write it to another file: "
            "--json FILE",
            report=report,
            code="bundle.unwritable",
        ) from error
