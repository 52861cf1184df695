"""A bundle: a folder of ONNX graphs and the manifest that says how to run them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlmport.bundle.hashing import FileEntry, hash_file
from vlmport.bundle.manifest import Manifest, Variant
from vlmport.bundle.manifest_file import MANIFEST, read_manifest
from vlmport.bundle.precisions import ANY
from vlmport.errors import BundleError, some_problems

CARD = "README.md"  # people edit it before they publish, so the manifest does not list it


@dataclass(frozen=True, repr=False)
class Bundle:
    """A folder of ONNX graphs and its manifest; `export` writes one, `VLM.open` runs it.

    Attributes:
        folder: the folder.
        manifest: the contents of its vlmport.json.
    """

    folder: Path
    manifest: Manifest

    def __repr__(self) -> str:
        of, size = self.manifest, sum(entry.size for entry in self.manifest.files.values())
        return (
            f"Bundle({str(self.folder)!r}, family={of.family!r}, layout={of.layout!r}, "
            f"precisions={of.precisions}, {size / 1e6:.1f} MB)"
        )

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        check_hashes: bool = False,
        needed: Collection[str] | None = None,
    ) -> Bundle:
        """Read a bundle, and check that its files are there and have the right sizes.

        Args:
            folder: the bundle's folder.
            check_hashes: compare the SHA-256 of each file too (default False).
            needed: names of the files that have to be there; None for all.

        Returns:
            The bundle.

        Raises:
            BundleError: the bundle is missing, malformed, newer than this version of vlmport,
                incomplete or altered.
        """
        folder = Path(folder)
        bundle = cls(folder, read_manifest(folder / MANIFEST))
        bundle.check(hashes=check_hashes, needed=needed)
        return bundle

    def check(self, *, hashes: bool = False, needed: Collection[str] | None = None) -> None:
        """Compare the folder with the manifest. Raises BundleError naming every bad file."""
        problems = []
        for name, entry in self.manifest.files.items():
            if needed is not None and name not in needed:
                continue
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif (size := path.stat().st_size) != entry.size:
                problems.append(f"{name}: {size} bytes, expected {entry.size}")
            elif hashes and not _is_as_listed(path, entry):
                problems.append(f"{name}: its SHA-256 is not the manifest's")
        if problems:
            raise BundleError(
                f"{self.folder}: {len(problems)} of {len(self.manifest.files)} files are not as "
                f"{MANIFEST} says: {some_problems(problems)}",
                hint="download or export the bundle again",
                code="bundle.not-as-listed",
            )

    def needs_layout(self, layout: str) -> None:
        """Raise BundleError where the folder is of another layout."""
        if (found := self.manifest.layout) != layout:
            raise BundleError(
                f"{self.folder}: written in the layout {found!r}, expected {layout!r}",
                hint=f"`vlmport export SRC OUT --layout {layout}` writes that one; "
                "docs/bundle-format.md says which programs run the others",
                code="bundle.other-layout",
            )

    def path(self, name: str) -> Path:
        """Return the path of a file named in the manifest."""
        return self.folder / name

    def variant(self, component: str, precision: str) -> Variant:
        """Return the files of a component at a precision (or its only form)."""
        forms = self.manifest.components[component]
        return forms[precision if precision in forms else ANY]


def is_bundle(folder: Path) -> bool:
    """Return whether the folder holds a manifest."""
    return (folder / MANIFEST).is_file()


def _is_as_listed(path: Path, entry: FileEntry) -> bool:
    try:
        return hash_file(path) == entry
    except OSError as error:
        raise BundleError(
            f"{path}: {error.strerror or error}",
            hint="check the file's permissions, and the disk",
            code="bundle.unreadable",
        ) from error


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """Hash all files below a folder except the manifest and the card; sorted by path."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    return {name: hash_file(folder / name) for name in names if name not in (MANIFEST, CARD)}
