"""Collect the examples that a bundle is measured on: images with right captions, or with a question
and its answer."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.builtin.questions import held_out_questions
from vlmport.builtin.scenes import Scene, caption, draw, held_out
from vlmport.errors import EvaluationError, OptionError, some_names
from vlmport.evaluation.captions import find_captions, read_captions

if TYPE_CHECKING:
    from vlmport.runtime.images.reading import ImageSource

SCENES = "held-out scenes of shapes"
QUESTIONS = "held-out questions about shapes"
SCENE_COUNT = 1000
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Example:
    """Images with their right captions or answers.

    Attributes:
        sources: files of images, or scenes, which are drawn only when they are used.
        references: the right texts; each of them counts.
        question: None where a caption of one image is asked for.
    """

    name: str
    sources: tuple[Path | Scene, ...]
    references: tuple[str, ...]
    question: str | None = None

    @property
    def images(self) -> list[ImageSource]:
        """The images, with scenes drawn."""
        return [draw(one) if isinstance(one, Scene) else one for one in self.sources]


@dataclass(frozen=True)
class ExampleSet:
    """Examples in order.

    Attributes:
        name: a name for people, which the model card shows.
        left_out: images of the folder that have no captions.
    """

    name: str
    examples: tuple[Example, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def is_drawn(self) -> bool:
        """Whether these are drawn scenes, which only models trained on scenes describe rightly."""
        return isinstance(self.examples[0].sources[0], Scene)

    @property
    def asks(self) -> bool:
        """Whether these are questions; otherwise they are captions."""
        return self.examples[0].question is not None

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the files' bytes, names and captions; a scene follows from its name.

        Figures of two runs are compared only where it is the same.
        """
        listed = [
            [one.name, *map(_bytes_of, one.sources), *_asked(one), *one.references]
            for one in self.examples
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def images(self) -> Iterator[ImageSource]:
        """Iterate over the images of all examples, so that only a batch of them is in memory."""
        return (image for example in self.examples for image in example.images)


def _asked(example: Example) -> list[str]:
    return [] if example.question is None else [example.question]


def _bytes_of(source: Path | Scene) -> str | None:
    """Hash a file; None for a scene, and for a file that can't be read, which is not measured."""
    if isinstance(source, Scene):
        return None
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def drawn_scenes(limit: int | None = None) -> ExampleSet:
    """Take the first of the 1,000 held-out scenes that the built-in `shapes` is measured on."""
    scenes = held_out(min(_checked(limit) or SCENE_COUNT, SCENE_COUNT))
    return ExampleSet(
        SCENES,
        tuple(Example(f"scene {n}", (one,), (caption(one),)) for n, one in enumerate(scenes)),
    )


def drawn_questions(limit: int | None = None) -> ExampleSet:
    """Take the first of the 1,000 held-out questions for the built-in models that answer questions.

    Every fourth is about two images.
    """
    asked = held_out_questions(min(_checked(limit) or SCENE_COUNT, SCENE_COUNT))
    return ExampleSet(
        QUESTIONS,
        tuple(
            Example(f"question {n}", tuple(scenes), (one.answer,), one.question)
            for n, (one, scenes) in enumerate(asked)
        ),
    )


def captioned_pictures(
    folder: str | Path, captions: str | Path | None = None, limit: int | None = None
) -> ExampleSet:
    """List the images of a folder that a file of captions names, in its order.

    Args:
        captions: the file; None finds it in the folder, and then it has to name every image.
        limit: maximum number of images, from the first.

    Raises EvaluationError for a missing folder, bad captions, and missing images.
    """
    folder, limit = Path(folder).expanduser(), _checked(limit)
    if not folder.is_dir():
        what = "a file, expected a folder" if folder.exists() else "no such folder"
        raise EvaluationError(
            f"{folder}: {what}",
            hint="check the path; it must be a folder of images with captions",
            code="source.not-a-folder",
        )
    file = find_captions(folder) if captions is None else Path(captions).expanduser()
    listed = read_captions(file)
    if missing := [name for name in listed if not (folder / name).is_file()]:
        raise EvaluationError(
            f"{file}: {len(missing)} of {len(listed)} images are not in {folder}: "
            f"{some_names(missing)}",
            hint="names are relative to the folder; add the files, or remove their captions",
            code="captions.image-missing",
        )
    bare = _without_captions(folder, listed)
    if bare and captions is None:
        raise EvaluationError(
            f"{file}: {len(bare)} images of the folder have no caption: {some_names(bare)}",
            hint="add captions or move the images; with --captions FILE they are left out",
            code="captions.missing",
        )
    examples = [Example(name, (folder / name,), texts) for name, texts in listed.items()]
    return ExampleSet(folder.resolve().name, tuple(examples[:limit]), tuple(bare))


def _without_captions(folder: Path, listed: dict[str, tuple[str, ...]]) -> list[str]:
    """List the images below the folder that the file of captions does not name."""
    known = {(folder / name).resolve() for name in listed}
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES and path.is_file() and path.resolve() not in known
    )


def _checked(limit: int | None) -> int | None:
    """Return a limit. Raises OptionError for one below 1."""
    if limit is not None and limit < 1:
        raise OptionError(
            f"limit={limit}: expected at least 1", hint="None takes all", code="option.wrong-value"
        )
    return limit
