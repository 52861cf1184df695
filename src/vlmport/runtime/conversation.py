"""A conversation: turns that build on each other, and a cache that is carried on.

The row of the cache is kept from turn to turn with the ids that it was computed from. A new prompt
is the whole conversation, rendered again. As far as its ids (and, under image tokens, its images)
are those of the row, nothing is encoded or prefilled again. If a template renders an answer
differently from how it was generated, that costs time, but never changes a token.

Traps:
- The conversation so far is one `_History`, replaced in one assignment when an answer is complete:
  an interrupt or an error leaves the old one.
- An image is kept as features, not as pixels: the tiles of one image are tens of megabytes.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from vlmport.errors import PromptError, quoted
from vlmport.runtime.decoding.generate_options import GenerateOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.images.features import PromptImage
from vlmport.runtime.messages import Message, check_images, check_messages
from vlmport.runtime.preparing import PreparedRequest, Preparer, ReusablePrefix, refuse_several
from vlmport.runtime.response import Response

if TYPE_CHECKING:
    from jaxtyping import Int64

    from vlmport.runtime.images.reading import ImageSource


@dataclass(frozen=True, eq=False)
class _History:
    """The conversation so far.

    Attributes:
        messages: every content is a list of parts; images in it are as they were given.
        images: the same images, encoded.
        attached: images for the next question, as they were given and processed.
    """

    messages: tuple[Message, ...] = ()
    images: tuple[PromptImage, ...] = ()
    attached: tuple[tuple[Any, PromptImage], ...] = ()


@dataclass(frozen=True)
class _OpenTurn:
    """A question that is being answered.

    Attributes:
        before: the conversation when the question was asked.
        kept: the earlier messages that are still part of the prompt.
    """

    before: _History
    kept: tuple[Message, ...]
    message: Message
    prepared: PreparedRequest


class Conversation:
    """Questions and answers, with images anywhere among them. `VLM.conversation` starts one.

        chat = model.conversation(system="Answer in one word.")
        chat.ask("What color is the square?", images=["red_square.png"])
        chat.ask("And what is left of it?")

    A question belongs to the conversation once its answer is complete. After an error, an interrupt
    or a stream that is closed early, the conversation is as it was before the question; the work on
    the prompt is kept for when it is asked again.

    Attributes:
        last: the last complete answer, as a Response; None before the first. After `stream`, which
            gives text alone, it has the token ids, times and counts.
    """

    def __init__(
        self,
        preparer: Preparer,
        system: str | None = None,
        *,
        image_options: Mapping[str, Any] | None = None,
        drop_oldest: bool = False,
    ):
        """Raises OptionError for image options that the image processor does not have."""
        if image_options:
            preparer.components.check_image_options(image_options)
        self._preparer, self._image_options = preparer, dict(image_options or {})
        self._drop_oldest = drop_oldest
        self._start: tuple[Message, ...] = ()
        if system is not None:
            self._start = tuple(_checked([{"role": "system", "content": system}]))
        self._history = _History(self._start)
        self._reusable: ReusablePrefix | None = None
        self.last: Response | None = None

    def __repr__(self) -> str:
        start = len(self._start)
        questions, images = (len(self._history.messages) - start) // 2, len(self._history.images)
        facts = [f"questions={questions}", f"images={images}"]
        if start:
            facts.insert(0, f"system={quoted(self._start[0]['content'][0]['text'], 40)}")
        if self.attached:
            facts.append(f"attached={self.attached}")
        return f"Conversation({', '.join([*facts, f'cached_tokens={self.cached_tokens}'])})"

    @property
    def messages(self) -> list[Message]:
        """The messages so far, in the form that `VLM.generate` takes, with the images as given."""
        return [_copied(message) for message in self._history.messages]

    @property
    def attached(self) -> int:
        """Number of images attached to the next question."""
        return len(self._history.attached)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the cache, which the next question does not prefill again."""
        return 0 if self._reusable is None else len(self._reusable.ids)

    @property
    def fills_context(self) -> bool:
        """True if the last answer was cut because the model's context is full."""
        counts = {} if self.last is None or self.last.complete else self.last.counts
        used = sum(counts.get(name, 0) for name in ("prompt_tokens", "new_tokens"))
        return used > self._preparer.components.manifest.dims.context_length

    def attach(self, image: ImageSource) -> None:
        """Attach an image to the next question, before those that `ask` is given.

        Args:
            image: an image, as `VLM.caption` takes it.

        Raises:
            ImageError: it can't be read or processed.
        """
        processed = self._preparer.image(image, self._image_options)
        attached = (*self._history.attached, (image, processed))
        self._history = replace(self._history, attached=attached)

    def detach(self) -> None:
        """Remove the images that are attached to the next question."""
        self._history = replace(self._history, attached=())

    def reset(self) -> None:
        """Forget everything but the system message: attached images and the cache too."""
        self._history, self._reusable, self.last = _History(self._start), None, None

    def ask(
        self,
        question: str | None = None,
        images: Sequence[ImageSource] = (),
        **options: Unpack[GenerateOptions],
    ) -> Response:
        """Ask a question about these images and everything before.

        Args:
            question: the question; None asks for a caption, with the prompt of `VLM.caption`.
            images: images, as `VLM.caption` takes them. They come before the question, after those
                that were attached.
            **options: how tokens are chosen, see GenerationOptions; over the bundle's defaults.

        Returns:
            The answer. With several (num_return_sequences), the conversation continues with the
            best, and `alternatives` has the others.

        Raises:
            ImageError: an image can't be read or processed.
            PromptError: the conversation would be longer than the context, or the bundle takes no
                questions.
            OptionError: an option is unknown, out of its range, or contradicts another.
        """
        turn = self._begin(question, images, options)
        generation = Generation(self._preparer.components, [turn.prepared.request])
        try:
            generation.run()
        except KeyboardInterrupt:
            self._keep_row(turn, generation)
            raise
        self._preparer.warn_of_a_cut(turn.prepared)
        return self._end(turn, generation)

    def stream(
        self,
        question: str | None = None,
        images: Sequence[ImageSource] = (),
        **options: Unpack[GenerateOptions],
    ) -> Generator[str, None, None]:
        """Ask as `ask` does, and give the answer piece by piece.

        The answer belongs to the conversation when its last piece is given. Close the iterator
        before that to end the work: the conversation is then as it was.

        Args:
            question: as for `ask`.
            images: as for `ask`.
            **options: as for `ask`, but for several beams or sequences.

        Returns:
            An iterator over pieces of text.

        Raises:
            ImageError, PromptError, OptionError: as `ask` does, and at once, not at the first
                piece. PromptError at the end where another question was asked meanwhile: one
                stream at a time.
        """
        refuse_several(self._preparer.decoding(options).options)
        return self._pieces(self._begin(question, images, options))

    def _pieces(self, turn: _OpenTurn) -> Generator[str, None, None]:
        request = turn.prepared.request
        generation = Generation(self._preparer.components, [request])
        ended = False
        try:
            for piece in self._preparer.pieces(turn.prepared, generation):
                if request.search.done:
                    self._end(turn, generation)
                    ended = True
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            if not ended:
                self._keep_row(turn, generation)
            raise
        finally:
            request.cancel()
        if not ended:  # the last token had no text
            self._end(turn, generation)

    def _begin(
        self, question: str | None, images: Sequence[ImageSource], options: Mapping[str, Any]
    ) -> _OpenTurn:
        """Do everything that comes before the first run of the decoder."""
        before, decoding = self._history, self._preparer.decoding(options)
        given = [image for image, _ in before.attached]
        message = self._message(question, given, images)
        kept, earlier = before.messages, before.images
        text = self._text_ids(kept, message)
        start = time.perf_counter()
        new = [self._preparer.image(one, self._image_options) for one in images]
        own = [*(image for _, image in before.attached), *new]
        while True:
            rest = kept[len(self._start) :]  # questions and answers, one after the other
            drops = self._drop_oldest and bool(rest)
            try:
                prepared = self._preparer.assemble(
                    text, [*earlier, *own], decoding, start, self._reusable, leaves_room=drops
                )
                return _OpenTurn(before, kept, message, prepared)
            except PromptError as error:
                too_long = error.code == "prompt.too-long"
                if not (too_long and rest and self._fits_alone(message, own)):
                    raise
                if not drops:
                    raise self._full(error) from error
            kept = (*self._start, *rest[2:])
            earlier = earlier[_count_images(rest[:2]) :]
            text = self._text_ids(kept, message)

    def _fits_alone(self, message: Message, images: Sequence[PromptImage]) -> bool:
        """Whether a question would fit into the context of a new conversation."""
        text = self._text_ids(self._start, message)
        ids = self._preparer.prompter.splice(text, [image.prompt_ids for image in images])
        return len(ids) <= self._preparer.components.manifest.dims.context_length

    def _text_ids(self, before: Sequence[Message], message: Message) -> Int64[np.ndarray, " S"]:
        return self._preparer.text_ids(check_messages([*before, message]).messages)

    @staticmethod
    def _full(error: PromptError) -> PromptError:
        return PromptError(
            f"the conversation is full: with this question {error}",
            hint="call reset() to begin a new one, or use drop_oldest=True",
            code="conversation.full",
        )

    def _message(
        self, question: str | None, attached: Sequence[Any], images: Sequence[Any]
    ) -> Message:
        """Make a user's message; without a question, the bundle's message for a caption."""
        check_images(images)
        if question is not None and not isinstance(question, str):
            raise PromptError(
                f"the question is of type {type(question).__name__}, expected str",
                hint='ask("…", images=[…])',
                code="prompt.wrong-value",
            )
        if question is not None:
            parts = [{"type": "image"} for _ in (*attached, *images)]
            asked: Sequence[Message] = [
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
            ]
        else:
            asked = self._preparer.components.manifest.prompt.caption
        if len(asked) != 1:
            raise PromptError(
                f"this bundle has no caption prompt of one message, but one of {len(asked)}",
                hint="give a question, or call `caption` of the model",
                code="prompt.no-question",
            )
        (message,) = _checked(asked, [*attached, *images])
        return message

    def _end(self, turn: _OpenTurn, generation: Generation) -> Response:
        """The question and its answer are part of the conversation from here on.

        Raises PromptError where the conversation has changed since the question was asked.
        """
        if self._history is not turn.before:
            raise PromptError(
                "the conversation changed while this answer was generated",
                hint="read a stream to its end, or close it, before the next question",
                code="conversation.went-on",
            )
        text = self._preparer.history(turn.prepared)
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        messages = (*turn.kept, turn.message, answer)
        self._keep_row(turn, generation)
        self._history = _History(messages, turn.prepared.images)
        self.last = self._preparer.response(turn.prepared, generation.seconds)
        return self.last

    def _keep_row(self, turn: _OpenTurn, generation: Generation) -> None:
        """Keep the row of the cache for the next turn, if it contains the whole prompt."""
        prepared, row = turn.prepared, generation.save(turn.prepared.request)
        if self._history is turn.before and row.length >= len(prepared.ids):
            ids = np.concatenate([prepared.ids, np.array(prepared.request.tokens, np.int64)])
            self._reusable = ReusablePrefix(row, ids[: row.length], prepared.image_rows)


def _checked(messages: Sequence[Message], images: Sequence[Any] = ()) -> list[Message]:
    """Check messages, and put their images into their parts."""
    chat = check_messages(messages, images)
    rest = iter(chat.images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in chat.messages
    ]


def _count_images(messages: Sequence[Message]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _copied(message: Message) -> Message:
    return {**message, "content": [dict(part) for part in message["content"]]}
