"""What a bundle is measured on: pictures with the captions that are right for them, or with a
question and its answer."""

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
    """Pictures (files, or scenes that are drawn when their turn comes) and what is right to say.

    Attributes:
        references: any of them is right.
        question: None where a caption of one picture is asked for.
    """

    name: str
    sources: tuple[Path | Scene, ...]
    references: tuple[str, ...]
    question: str | None = None

    @property
    def images(self) -> list[ImageSource]:
        return [draw(one) if isinstance(one, Scene) else one for one in self.sources]


@dataclass(frozen=True)
class ExampleSet:
    """Pictures in order.

    Attributes:
        name: for people; it stands in the model card.
        left_out: pictures beside them that have no captions.
    """

    name: str
    examples: tuple[Example, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def is_drawn(self) -> bool:
        """Whether these are scenes, about which only a model trained on them says what is right."""
        return isinstance(self.examples[0].sources[0], Scene)

    @property
    def asks(self) -> bool:
        """Whether these are questions; captions otherwise."""
        return self.examples[0].question is not None

    @functools.cached_property
    def sha256(self) -> str:
        """Of the files' bytes, names and captions: only where all are the same are figures of two
        runs compared. A scene follows from its name."""
        listed = [
            [one.name, *map(_bytes_of, one.sources), *_asked(one), *one.references]
            for one in self.examples
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def images(self) -> Iterator[ImageSource]:
        """The picture of each caption, one at a time: no more than a batch is in memory."""
        return (image for example in self.examples for image in example.images)


def _asked(example: Example) -> list[str]:
    return [] if example.question is None else [example.question]


def _bytes_of(source: Path | Scene) -> str | None:
    """A file's SHA-256; None for a scene, and for a file that can't be read: it is not measured."""
    if isinstance(source, Scene):
        return None
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def drawn_scenes(limit: int | None = None) -> ExampleSet:
    """The first of the 1,000 held-out scenes that the built-in `shapes` is measured on."""
    scenes = held_out(min(_checked(limit) or SCENE_COUNT, SCENE_COUNT))
    return ExampleSet(
        SCENES,
        tuple(Example(f"scene {n}", (one,), (caption(one),)) for n, one in enumerate(scenes)),
    )


def drawn_questions(limit: int | None = None) -> ExampleSet:
    """The first of the 1,000 held-out questions that the built-in models which answer are measured
    on, every fourth about two pictures."""
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
    """The pictures of a folder that a file of captions names, in its order.

    Args:
        captions: the file; None finds it in the folder, and then it has to name every picture.
        limit: take the first so many.

    Raises EvaluationError for a missing folder, bad captions, and pictures that are not there.
    """
    folder, limit = Path(folder).expanduser(), _checked(limit)
    if not folder.is_dir():
        what = "a file, expected a folder" if folder.exists() else "no such folder"
        raise EvaluationError(
            f"{folder}: {what}",
            hint="give the folder that holds the pictures",
            code="source.not-a-folder",
        )
    file = find_captions(folder) if captions is None else Path(captions).expanduser()
    listed = read_captions(file)
    if missing := [name for name in listed if not (folder / name).is_file()]:
        raise EvaluationError(
            f"{file}: {len(missing)} of {len(listed)} pictures are not in {folder}: "
            f"{some_names(missing)}",
            hint="names are relative to the folder; add the files, or take out their captions",
            code="captions.image-missing",
        )
    bare = _without_captions(folder, listed)
    if bare and captions is None:
        raise EvaluationError(
            f"{file}: {len(bare)} pictures of the folder have no caption: {some_names(bare)}",
            hint="caption them or move them away; --captions FILE leaves them out",
            code="captions.missing",
        )
    examples = [Example(name, (folder / name,), texts) for name, texts in listed.items()]
    return ExampleSet(folder.resolve().name, tuple(examples[:limit]), tuple(bare))


def _without_captions(folder: Path, listed: dict[str, tuple[str, ...]]) -> list[str]:
    """Pictures below the folder that no caption names."""
    known = {(folder / name).resolve() for name in listed}
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES and path.is_file() and path.resolve() not in known
    )


def _checked(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise OptionError(
            f"limit={limit}: expected at least 1", hint="None takes all", code="option.wrong-value"
        )
    return limit
