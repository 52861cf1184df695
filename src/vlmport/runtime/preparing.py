"""Turn messages and images into requests, and finished requests into responses.

The steps of one request, from `Preparer.prepare`:

1. check the messages and take the images out of them (messages.py)
2. render and tokenize the text (prompt.py)
3. run the image processor on each image (images/), which says how many tokens it takes
4. check that prompt and answer fit into the context (request.py), before anything is encoded
5. encode the images, embed the tokens, write the features over the image rows (graphs/)
6. make the request with its search (request.py, decoding/)
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import AnswerWarning, OptionError, warn
from vlmport.runtime.content_store import ContentStore
from vlmport.runtime.decoding.grammar import Grammar, Grammars
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.search import Hypothesis
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import SavedRow
from vlmport.runtime.graphs.components import EMBED, Components, merge_image_features
from vlmport.runtime.images.features import MAX_BYTES, FeatureCache, PromptImage
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.messages import Message, check_messages
from vlmport.runtime.prompt import Prompter
from vlmport.runtime.request import Request, answer_length, check_default, new_request
from vlmport.runtime.response import Answer, AnswerText, Response
from vlmport.runtime.streamed_text import StopStrings

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class Decoding:
    """How to decode: checked once for all requests of a call."""

    options: GenerationOptions
    grammar: Grammar | None
    stops: StopStrings | None


@dataclass(frozen=True)
class ReusablePrefix:
    """A saved row of the cache, and the prompt that it was computed from.

    Attributes:
        ids: one token id for each token of the row.
        image_rows: for each image row of that prompt, the content hash of its image.
    """

    row: SavedRow
    ids: Int64[np.ndarray, " P"]
    image_rows: tuple[bytes, ...]

    def shared(
        self, ids: Int64[np.ndarray, " S"], image_rows: Sequence[bytes], image_token_id: int
    ) -> int:
        """Count the tokens at the start that a new prompt has in common with the row.

        At least one token of the prompt is left over: its logits choose the first new token.
        """
        length = min(len(self.ids), len(ids) - 1)
        if len(other := np.flatnonzero(self.ids[:length] != ids[:length])):
            length = int(other[0])
        for n, place in enumerate(np.flatnonzero(ids[:length] == image_token_id)):
            # An image token that the model generated itself is text and belongs to no image.
            if n >= len(self.image_rows) or self.image_rows[n] != image_rows[n]:
                return int(place)
        return length


@dataclass(frozen=True)
class PreparedRequest:
    """A request, and what its response needs besides.

    Attributes:
        ids: the whole prompt, image tokens included.
        images: the images of the prompt, encoded.
        image_rows: for each image row of the prompt, the content hash of its image.
        decoding: how the prompt is answered.
        image_seconds: time spent on reading and encoding images.
    """

    request: Request
    ids: Int64[np.ndarray, " S"]
    images: tuple[PromptImage, ...]
    image_rows: tuple[bytes, ...]
    decoding: Decoding
    image_seconds: float


class Preparer:
    """A bundle's chat template, tokenizer and image cache.

    Attributes:
        prompter: the chat template and the tokenizer.
        features: the cache of recently encoded images.
    """

    def __init__(
        self,
        components: Components,
        image_cache_bytes: int = MAX_BYTES,
        store: ContentStore | None = None,
    ):
        self.components, manifest = components, components.manifest
        self.prompter = Prompter(components.bundle.folder, manifest.prompt)
        self.features = FeatureCache(components, image_cache_bytes, store)
        self._grammars = Grammars(
            self.prompter.tokenizer, manifest.dims.vocab_size, manifest.generation.stop_token_ids
        )

    def decoding(self, given: Mapping[str, Any]) -> Decoding:
        """Merge the options of a call with the bundle's defaults; a default that can't be served
        is left out with a warning. Raises OptionError or DependencyError."""
        options = GenerationOptions.merged(
            self.components.manifest.generation.defaults,
            given,
            functools.partial(check_default, self.components),
        )
        return Decoding(options, self._grammars.of(options), self._stop_strings(options))

    def _stop_strings(self, options: GenerationOptions) -> StopStrings | None:
        if not options.stop_strings:
            return None
        skip = options.skip_special_tokens
        return StopStrings(self.prompter.tokenizer, options.stop_strings, skip_special_tokens=skip)

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[Any],
        decoding: Decoding,
        image_options: Mapping[str, Any] | None = None,
    ) -> PreparedRequest:
        """Make a request of messages and images. Raises ImageError, PromptError or OptionError."""
        chat = check_messages(messages, images, self.components.manifest.image_options)
        text = self.text_ids(chat.messages)
        start = time.perf_counter()
        processed = [
            self.image(image, {**(image_options or {}), **own})
            for image, own in zip(chat.images, chat.options, strict=True)
        ]
        return self.assemble(text, processed, decoding, start)

    def text_ids(self, messages: Sequence[Message]) -> Int64[np.ndarray, " S"]:
        """Tokenize checked messages, with one placeholder for each image."""
        return self.prompter.ids(messages)

    def image(self, source: Any, options: Mapping[str, Any] | None = None) -> PromptImage:
        """Read and process an image, without encoding it. Raises ImageError or OptionError."""
        return self.features.process(open_image(source), options)

    def prompt(
        self,
        text: Int64[np.ndarray, " S"],
        images: Sequence[PromptImage],
        decoding: Decoding,
        *,
        leaves_room: bool = False,
    ) -> tuple[Int64[np.ndarray, " S"], int]:
        """Return the ids of the whole prompt, and the maximum number of new tokens after it.

        Raises PromptError or OptionError as `assemble` does; nothing is encoded.
        """
        ids = self.prompter.splice(text, [image.prompt_ids for image in images])
        length = answer_length(self.components, len(ids), decoding.options, leaves_room=leaves_room)
        self.components.checked(ids, EMBED)
        return ids, length

    def assemble(
        self,
        text: Int64[np.ndarray, " S"],
        images: Sequence[PromptImage],
        decoding: Decoding,
        start: float,
        reusable: ReusablePrefix | None = None,
        *,
        leaves_room: bool = False,
    ) -> PreparedRequest:
        """Make a request of token ids and processed images.

        Args:
            start: when the work on the images began.
            reusable: a row whose tokens are not computed again, as far as the prompt begins alike.
            leaves_room: refuse a prompt that leaves no room for an answer: for max_new_tokens, or
                for a quarter of the context where that is less.

        Raises PromptError or OptionError before anything is encoded.
        """
        ids, length = self.prompt(text, images, decoding, leaves_room=leaves_room)
        token = self.components.manifest.prompt.image_token_id
        counts = self._counts(images)
        image_rows = _rows_of(images, counts)
        shared = 0 if reusable is None else reusable.shared(ids, image_rows, token)
        encoded = tuple(self.features.encoded(image) for image in images)
        features, known = [], int((ids[:shared] == token).sum())  # rows that are computed already
        for image, count in zip(encoded, counts, strict=True):
            features.append(image.rows[known:])
            known = max(0, known - count)
        positions = self.components.position_ids(ids, [image.inputs for image in encoded])
        seconds = time.perf_counter() - start
        stops, grammar = decoding.stops, decoding.grammar
        request = new_request(
            self.components,
            self._embed(ids[shared:], features),
            decoding.options,
            max_new_tokens=length,
            prompt_ids=ids,
            positions=positions.ids[..., shared:],
            rope_delta=positions.rope_delta,
            prefix=reusable.row.first(shared) if reusable is not None and shared else None,
            is_stopped=stops.ends if stops else None,
            mask=grammar.fresh().mask if grammar else None,
        )
        return PreparedRequest(request, ids, encoded, image_rows, decoding, seconds)

    def prompt_rows(
        self, text: Int64[np.ndarray, " S"], images: Sequence[PromptImage]
    ) -> tuple[Int64[np.ndarray, " S"], tuple[bytes, ...]]:
        """Return a prompt's ids and image_rows, as its PreparedRequest will have them."""
        ids = self.prompter.splice(text, [image.prompt_ids for image in images])
        return ids, _rows_of(images, self._counts(images))

    def _counts(self, images: Sequence[PromptImage]) -> list[int]:
        """Return the number of image rows of each image."""
        token = self.components.manifest.prompt.image_token_id
        return [int((image.prompt_ids == token).sum()) for image in images]

    def _embed(
        self, ids: Int64[np.ndarray, " S"], features: Sequence[Float[np.ndarray, "T D"]]
    ) -> Float[np.ndarray, "S D"]:
        embeds = self.components.embed(ids[None])[0]
        rows = np.concatenate(features) if features else np.zeros((0, embeds.shape[1]), np.float32)
        token = self.components.manifest.prompt.image_token_id
        return merge_image_features(embeds, ids, rows, token)

    def pieces(self, prepared: PreparedRequest, generation: Generation) -> Iterator[str]:
        """Yield the answer piece by piece; the last piece comes when the search is done."""
        text = self._text(prepared)
        for _ in generation:
            (answer,) = prepared.request.search.results()
            if piece := text.push(answer.tokens, answer.stop_reason):
                if answer.stop_reason:
                    self.warn_of_a_cut(prepared)
                yield piece

    def response(self, prepared: PreparedRequest, seconds: Mapping[str, float]) -> Response:
        """Make the response of a request, finished or not."""
        request, text = prepared.request, self._text(prepared)

        def answer(found: Hypothesis) -> Answer:
            complete = _is_complete(prepared, found)
            return dataclasses.replace(text.whole(found), complete=complete)

        best, *others = map(answer, _found(prepared))
        return Response(
            best.text,
            best.token_ids,
            best.stop_reason,
            best.score,
            best.logprobs,
            best.complete,
            timings={"image": prepared.image_seconds, **seconds},
            counts={
                "prompt_tokens": len(prepared.ids),
                "cached_tokens": len(prepared.ids) - len(request.embeds),
                "image_tokens": len(prepared.image_rows),
                "new_tokens": len(best.token_ids),
            },
            seed=request.search.seed,
            alternatives=tuple(others),
        )

    def history(self, prepared: PreparedRequest) -> str:
        """Return the best answer as the next turn of a conversation contains it."""
        return self._text(prepared).without_stop_token(_found(prepared)[0]).strip()

    def warn_of_a_cut(self, prepared: PreparedRequest) -> None:
        """Warn where an answer under a grammar was cut before its end."""
        best = _found(prepared)[0]
        if prepared.decoding.grammar is None or _is_complete(prepared, best):
            return
        warn(
            AnswerWarning(
                f"the answer was cut after {len(best.tokens)} tokens, before the grammar was "
                "complete; give a larger max_new_tokens",
                code="output.cut",
            )
        )

    def _text(self, prepared: PreparedRequest) -> AnswerText:
        return self.answer_text(prepared.decoding)

    def answer_text(self, decoding: Decoding) -> AnswerText:
        """Return what decodes the tokens of one answer."""
        skip = decoding.options.skip_special_tokens
        return AnswerText(self.prompter.tokenizer, decoding.stops, skip_special_tokens=skip)


def _rows_of(images: Sequence[PromptImage], counts: Sequence[int]) -> tuple[bytes, ...]:
    """Return the key of its image for each image row of a prompt."""
    return tuple(
        image.key for image, count in zip(images, counts, strict=True) for _ in range(count)
    )


def _found(prepared: PreparedRequest) -> list[Hypothesis]:
    found = prepared.request.search.results()
    if prepared.decoding.grammar:  # a beam that did not end may not match the grammar
        found = [one for one in found if one.stop_reason] or found
    return found


def _is_complete(prepared: PreparedRequest, found: Hypothesis) -> bool:
    if found.stop_reason in ("stop", "stop_string"):
        return True
    grammar = prepared.decoding.grammar
    return grammar is not None and grammar.fresh().accepts(found.tokens)


def refuse_several(options: GenerationOptions) -> None:
    """Raise OptionError where the options ask for several sequences, which can't be streamed."""
    if options.num_beams > 1 or options.num_return_sequences > 1:
        raise OptionError(
            "several sequences can't be streamed: the best one is known only at the end",
            hint="leave num_beams and num_return_sequences out, or call generate",
            code="option.contradiction",
        )
