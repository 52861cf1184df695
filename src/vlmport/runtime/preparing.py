"""What is asked, made ready to run, and what came of it: messages and pictures to a request, a
request to its caption."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import AnswerWarning, OptionError, warn
from vlmport.runtime.decoding.grammar import Grammar, Grammars
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.search import Hypothesis
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import KeptRow
from vlmport.runtime.graphs.components import Components, merge_image_features
from vlmport.runtime.images.features import MAX_BYTES, FeatureCache, Picture
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.messages import Message, check_messages
from vlmport.runtime.prompt import Prompter
from vlmport.runtime.request import Request, check_default, most_new_tokens, new_request
from vlmport.runtime.response import Answer, AnswerText, Response
from vlmport.runtime.streamed_text import StopStrings

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class Decoding:
    """How to decode: checked once for all prompts of a call."""

    options: GenerationOptions
    grammar: Grammar | None
    stops: StopStrings | None


@dataclass(frozen=True)
class Held:
    """What a row of the cache holds, and what that was made of.

    Attributes:
        ids: a token id for each token of the row.
        pictures: of each image row of the prompt, the content hash of the picture that it is of.
    """

    row: KeptRow
    ids: Int64[np.ndarray, " P"]
    pictures: tuple[bytes, ...]

    def shared(
        self, ids: Int64[np.ndarray, " S"], pictures: Sequence[bytes], image_token_id: int
    ) -> int:
        """How many tokens from the start a prompt has in common with the row.

        At least one token of the prompt is left: its logits choose the first new one.
        """
        length = min(len(self.ids), len(ids) - 1)
        if len(other := np.flatnonzero(self.ids[:length] != ids[:length])):
            length = int(other[0])
        for n, place in enumerate(np.flatnonzero(ids[:length] == image_token_id)):
            # An image token that the model said itself is a word, and of no picture.
            if n >= len(self.pictures) or self.pictures[n] != pictures[n]:
                return int(place)
        return length


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to run.

    Attributes:
        decoding: how it is answered.
        pictures: those in it, encoded.
        image_rows: of each image row, the content hash of its picture.
    """

    request: Request
    ids: Int64[np.ndarray, " S"]
    pictures: tuple[Picture, ...]
    image_rows: tuple[bytes, ...]
    decoding: Decoding
    image_seconds: float


class Asker:
    """A bundle's template, tokenizer and pictures.

    Attributes:
        prompter: its chat template and tokenizer.
        features: the cache of recently encoded pictures.
    """

    def __init__(self, components: Components, image_cache_bytes: int = MAX_BYTES):
        self.components, manifest = components, components.manifest
        self.prompter = Prompter(components.bundle.folder, manifest.prompt)
        self.features = FeatureCache(components, image_cache_bytes)
        self._grammars = Grammars(
            self.prompter.tokenizer, manifest.dims.vocab_size, manifest.generation.stop_token_ids
        )

    def decoding(self, given: Mapping[str, Any]) -> Decoding:
        """The options of a call over the bundle's, of which those are left out, with a warning,
        that can't be served. Raises OptionError or DependencyError."""
        options = GenerationOptions.merged(
            self.components.manifest.generation.defaults,
            given,
            functools.partial(check_default, self.components),
        )
        return Decoding(
            options,
            self._grammars.of(options),
            self._stop_strings(options),
        )

    def _stop_strings(self, options: GenerationOptions) -> StopStrings | None:
        if not options.stop_strings:
            return None
        skip = options.skip_special_tokens
        return StopStrings(self.prompter.tokenizer, options.stop_strings, skip_special_tokens=skip)

    def prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[Any],
        decoding: Decoding,
        image_options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Template → ids with pictures spliced in → embeddings with features over image rows.

        Raises ImageError, PromptError or OptionError.
        """
        chat = check_messages(messages, images, self.components.manifest.image_options)
        text = self.text_ids(chat.messages)
        start = time.perf_counter()
        pictures = [
            self.picture(image, {**(image_options or {}), **own})
            for image, own in zip(chat.images, chat.options, strict=True)
        ]
        return self.ready(text, pictures, decoding, start)

    def text_ids(self, messages: Sequence[Message]) -> Int64[np.ndarray, " S"]:
        """Checked messages as token ids, a placeholder for each picture."""
        return self.prompter.ids(messages)

    def picture(self, image: Any, options: Mapping[str, Any] | None = None) -> Picture:
        """A picture from wherever it is, not encoded yet. Raises ImageError or OptionError."""
        return self.features.process(open_image(image), options)

    def ready(
        self,
        text: Int64[np.ndarray, " S"],
        pictures: Sequence[Picture],
        decoding: Decoding,
        start: float,
        held: Held | None = None,
        *,
        leaves_room: bool = False,
    ) -> Prompt:
        """A prompt that can run. What does not fit is refused before anything is encoded.

        Args:
            start: when the work on the pictures began.
            leaves_room: refuse a prompt that leaves no room for an answer: for max_new_tokens, or a
                quarter of the context where that is less.
            held: what is not to be encoded and prefilled again, as far as the prompt begins alike.
        """
        ids = self.prompter.splice(text, [picture.prompt_ids for picture in pictures])
        # It has cost little so far.
        most_new_tokens(self.components, len(ids), decoding.options, leaves_room=leaves_room)
        self.components.check_ids(ids)
        token = self.components.manifest.prompt.image_token_id
        counts = [int((picture.prompt_ids == token).sum()) for picture in pictures]
        rows = tuple(
            picture.key
            for picture, count in zip(pictures, counts, strict=True)
            for _ in range(count)
        )
        shared = 0 if held is None else held.shared(ids, rows, token)
        known = int((ids[:shared] == token).sum())
        encoded = tuple(self.features.encoded(picture) for picture in pictures)
        features = []
        for picture, count in zip(encoded, counts, strict=True):
            features.append(picture.rows[known:])
            known = max(0, known - count)
        positions = self.components.position_ids(ids, [picture.inputs for picture in encoded])
        seconds = time.perf_counter() - start
        stops, grammar = decoding.stops, decoding.grammar
        request = new_request(
            self.components,
            self._embed(ids[shared:], features),
            decoding.options,
            prompt_ids=ids,
            positions=positions.ids[..., shared:],
            offset=positions.offset,
            prefix=held.row.first(shared) if held is not None and shared else None,
            is_stopped=stops.ends if stops else None,
            mask=grammar.fresh().mask if grammar else None,
        )
        return Prompt(request, ids, encoded, rows, decoding, seconds)

    def _embed(
        self, ids: Int64[np.ndarray, " S"], features: Sequence[Float[np.ndarray, "T D"]]
    ) -> Float[np.ndarray, "S D"]:
        embeds = self.components.embed(ids[None])[0]
        rows = np.concatenate(features) if features else np.zeros((0, embeds.shape[1]), np.float32)
        token = self.components.manifest.prompt.image_token_id
        return merge_image_features(embeds, ids, rows, token)

    def pieces(self, prompt: Prompt, generation: Generation) -> Iterator[str]:
        """The answer piece by piece as it is made. The last comes when the search is done."""
        text = self._text(prompt)
        for _ in generation:
            (answer,) = prompt.request.search.results()
            if piece := text.push(answer.tokens, answer.stop_reason):
                if answer.stop_reason:
                    self.warn_of_a_cut(prompt)
                yield piece

    def caption(self, prompt: Prompt, seconds: Mapping[str, float]) -> Response:
        """Build the response of a request, finished or not."""
        request, text = prompt.request, self._text(prompt)

        def answer(found: Hypothesis) -> Answer:
            complete = _is_complete(prompt, found)
            return dataclasses.replace(text.whole(found), complete=complete)

        best, *others = map(answer, _found(prompt))
        return Response(
            best.text,
            best.token_ids,
            best.stop_reason,
            best.score,
            best.logprobs,
            best.complete,
            timings={"image": prompt.image_seconds, **seconds},
            counts={
                "prompt_tokens": len(prompt.ids),
                "cached_tokens": len(prompt.ids) - len(request.embeds),
                "image_tokens": len(prompt.image_rows),
                "new_tokens": len(best.token_ids),
            },
            seed=request.search.seed,
            alternatives=tuple(others),
        )

    def history(self, prompt: Prompt) -> str:
        """The best answer, as a conversation goes on with it."""
        return self._text(prompt).without_stop_token(_found(prompt)[0]).strip()

    def warn_of_a_cut(self, prompt: Prompt) -> None:
        """Warn where an answer under a grammar is only the beginning of one."""
        best = _found(prompt)[0]
        if prompt.decoding.grammar is None or _is_complete(prompt, best):
            return
        warn(
            AnswerWarning(
                f"the answer was cut after {len(best.tokens)} tokens: it is only the beginning of "
                "what the grammar asks for; give a larger max_new_tokens",
                code="output.cut",
            )
        )

    def _text(self, prompt: Prompt) -> AnswerText:
        skip = prompt.decoding.options.skip_special_tokens
        return AnswerText(self.prompter.tokenizer, prompt.decoding.stops, skip_special_tokens=skip)


def _found(prompt: Prompt) -> list[Hypothesis]:
    found = prompt.request.search.results()
    if prompt.decoding.grammar:  # a beam that never ended may say anything
        found = [one for one in found if one.stop_reason] or found
    return found


def _is_complete(prompt: Prompt, found: Hypothesis) -> bool:
    if found.stop_reason in ("stop", "stop_string"):
        return True
    grammar = prompt.decoding.grammar
    return grammar is not None and grammar.fresh().accepts(found.tokens)


def refuse_several(options: GenerationOptions) -> None:
    """Raise OptionError where an answer can't be streamed."""
    if options.num_beams > 1 or options.num_return_sequences > 1:
        raise OptionError(
            "several sequences can't be streamed: which is best is known at the end",
            hint="leave num_beams and num_return_sequences out, or call generate",
            code="option.contradiction",
        )
