"""`VLM`: open a bundle, ask it about pictures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, overload

import numpy as np

from vlmport.bundle import Bundle
from vlmport.errors import ImageError, OptionError, PromptError
from vlmport.runtime.answer import Answer, AnswerText, Caption
from vlmport.runtime.components import Components, merge_image_features
from vlmport.runtime.features import FeatureCache
from vlmport.runtime.generate import Generation
from vlmport.runtime.grammar import Grammar, Grammars
from vlmport.runtime.images import open_image
from vlmport.runtime.options import GenerationOptions, whole_number
from vlmport.runtime.prompt import Message, Prompter, check_messages
from vlmport.runtime.request import Request, most_new_tokens, new_request
from vlmport.runtime.text import StopStrings

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from vlmport.runtime.images import ImageSource

__all__ = ["VLM", "Answer", "Caption"]

BATCH_SIZE = 8


@dataclass(frozen=True)
class _Decoding:
    """How to decode: checked once for all prompts of a call."""

    options: GenerationOptions
    grammar: Grammar | None
    stops: StopStrings | None


@dataclass(frozen=True)
class _Prompt:
    """One prompt, ready to run."""

    request: Request
    stops: StopStrings | None
    has_grammar: bool
    image_tokens: int
    image_seconds: float


class VLM:
    """A bundle, ready to run.

    Attributes:
        components: its graphs.
        prompter: its chat template and tokenizer.
        features: the pictures seen of late.
    """

    def __init__(self, components: Components):
        self.components = components
        self.prompter = Prompter(components.bundle.folder, components.manifest.prompt)
        self.features = FeatureCache(components)
        manifest = components.manifest
        self._grammars = Grammars(
            self.prompter.tokenizer, manifest.dims.vocab_size, manifest.generation.stop_token_ids
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> VLM:
        """Open a bundle folder.

        Args:
            precision: 'auto' (the bundle's choice for the device), one of `precisions`, or a mix
                such as 'vision=q4,decoder=fp32'.
            device: 'cpu', 'cuda', 'cuda:1', 'coreml', 'directml', 'webgpu', …
            threads: within an operator; None for one per core.

        Raises BundleError, DeviceError or TokenizerError.
        """
        return cls(Components.open(bundle, precision=precision, device=device, threads=threads))

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the whole bundle exists in."""
        return self.components.manifest.precisions

    @property
    def precision(self) -> str:
        """The precision in use, or the mix."""
        return self.components.precision

    @property
    def device(self) -> str:
        return str(self.components.device)

    def close(self) -> None:
        """Release the sessions and forget the pictures."""
        self.components.close()
        self.features.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @overload
    def caption(
        self, images: ImageSource, *, batch_size: int = BATCH_SIZE, **options: Any
    ) -> Caption: ...
    @overload
    def caption(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> list[Caption]: ...
    def caption(
        self, images: Any, *, batch_size: int = BATCH_SIZE, **options: Any
    ) -> Caption | list[Caption]:
        """Caption one picture, or several.

        Args:
            batch_size: pictures that are generated together. Each has the caption that it would
                have alone; memory grows with this number, not with that of the pictures.
            options: those of GenerationOptions, over the bundle's defaults.

        Raises ImageError, PromptError or OptionError, before its batch is generated.
        """
        if not isinstance(images, list | tuple):
            return self.caption([images], batch_size=batch_size, **options)[0]
        captions: list[Caption] = []
        for batch in self._batches(images, batch_size, options):
            for prompt in batch:
                if not isinstance(prompt, _Prompt):
                    raise prompt
            captions += self._run([prompt for prompt in batch if isinstance(prompt, _Prompt)])
        return captions

    def caption_each(
        self, images: Iterable[ImageSource], *, batch_size: int = BATCH_SIZE, **options: Any
    ) -> Iterator[Caption | ImageError | PromptError]:
        """Captions in the order of the pictures, as their batches are done.

        Where a picture can't be captioned its error comes in its place, and the others are
        captioned all the same. Arguments are those of `caption`. Raises OptionError here, not at
        the first caption.
        """
        return self._results(self._batches(images, batch_size, options))

    def _results(
        self, batches: Iterable[Sequence[_Prompt | ImageError | PromptError]]
    ) -> Iterator[Caption | ImageError | PromptError]:
        for batch in batches:
            captions = iter(self._run([one for one in batch if isinstance(one, _Prompt)]))
            for one in batch:
                yield next(captions) if isinstance(one, _Prompt) else one

    def _batches(
        self, images: Iterable[ImageSource], batch_size: int, options: Mapping[str, Any]
    ) -> Iterator[list[_Prompt | ImageError | PromptError]]:
        """Prompts for captions, or what is wrong with a picture, batch by batch."""
        size = whole_number("batch_size", batch_size, 1)
        decoding = self._decoding(options)
        asked = self.components.manifest.prompt.caption

        def prepared(image: ImageSource) -> _Prompt | ImageError | PromptError:
            try:
                return self._prompt(asked, [image], decoding)
            except (ImageError, PromptError) as error:
                return error

        rest = iter(images)
        return iter(lambda: [prepared(image) for image in itertools.islice(rest, size)], [])

    def generate(
        self, messages: Sequence[Message], images: Sequence[ImageSource] = (), **options: Any
    ) -> Caption:
        """Answer a conversation. Each part `{"type": "image"}` takes the next of `images`.

        Options are those of GenerationOptions, over the bundle's defaults.

        Raises ImageError, PromptError or OptionError, before anything is generated.
        """
        return self._run([self._prompt(messages, images, self._decoding(options))])[0]

    def stream(
        self,
        image: ImageSource | None = None,
        *,
        messages: Sequence[Message] | None = None,
        images: Sequence[ImageSource] = (),
        **options: Any,
    ) -> Iterator[str]:
        """The caption of a picture, or the answer to `messages`, piece by piece as it is made.

        All pieces together are the text that `caption` or `generate` gives. What is wrong with
        the arguments is raised here, not at the first piece. Closing the iterator, at any piece,
        ends the work. Raises OptionError for several sequences: none is sure before the end.
        """
        if (image is None) == (messages is None):
            raise PromptError(
                "stream takes a picture or messages, one of them",
                hint="stream(picture) or stream(messages=[…], images=[…])",
            )
        if messages is None:
            messages, images = self.components.manifest.prompt.caption, [cast(Any, image)]
        decoding = self._decoding(options)
        if decoding.options.num_beams > 1 or decoding.options.num_return_sequences > 1:
            raise OptionError(
                "several sequences can't be streamed: which is best is known at the end",
                hint="num_beams=1 and num_return_sequences=1, or don't stream",
            )
        return self._pieces(self._prompt(messages, images, decoding))

    def _pieces(self, prompt: _Prompt) -> Iterator[str]:
        request = prompt.request
        text = AnswerText(self.prompter.tokenizer, prompt.stops)
        try:
            for _ in Generation(self.components, [request]):
                (answer,) = request.search.results()
                if piece := text.push(answer.tokens, answer.stop_reason):
                    yield piece
        finally:
            request.cancel()

    def _decoding(self, given: Mapping[str, Any]) -> _Decoding:
        """The options of a call over the bundle's. Raises OptionError or DependencyError."""
        defaults = self.components.manifest.generation.defaults
        options = GenerationOptions.merged(defaults, given)
        stops = options.stop_strings
        return _Decoding(
            options,
            self._grammars.of(options),
            StopStrings(self.prompter.tokenizer, stops) if stops else None,
        )

    def _prompt(
        self, messages: Sequence[Message], images: Sequence[Any], decoding: _Decoding
    ) -> _Prompt:
        """Template → ids with pictures spliced in → embeddings with features over image rows."""
        chat = check_messages(messages, images)
        text = self.prompter.encode(self.prompter.render(chat.messages))
        start = time.perf_counter()
        pictures = [self.features.process(open_image(image)) for image in chat.images]
        ids = self.prompter.splice(text, [picture.prompt_ids for picture in pictures])
        most_new_tokens(self.components, len(ids), decoding.options)  # it has cost little so far
        features = [self.features.encode(picture) for picture in pictures]
        seconds = time.perf_counter() - start
        stops, grammar = decoding.stops, decoding.grammar
        request = new_request(
            self.components,
            self._embed(ids, features),
            decoding.options,
            prompt_ids=ids,
            positions=self.components.position_ids(ids),
            is_stopped=stops.ends if stops else None,
            mask=grammar.fresh().mask if grammar else None,
        )
        image_tokens = sum(len(one) for one in features)
        return _Prompt(request, stops, grammar is not None, image_tokens, seconds)

    def _embed(
        self, ids: Int64[np.ndarray, " S"], features: Sequence[Float[np.ndarray, "T D"]]
    ) -> Float[np.ndarray, "S D"]:
        embeds = self.components.embed(ids[None])[0]
        rows = np.concatenate(features) if features else np.zeros((0, embeds.shape[1]), np.float32)
        token = self.components.manifest.prompt.image_token_id
        return merge_image_features(embeds, ids, rows, token)

    def _run(self, prompts: Sequence[_Prompt]) -> list[Caption]:
        generation = Generation(self.components, [prompt.request for prompt in prompts])
        generation.run()
        return [self._caption(prompt, generation.seconds) for prompt in prompts]

    def _caption(self, prompt: _Prompt, seconds: Mapping[str, float]) -> Caption:
        request, text = prompt.request, AnswerText(self.prompter.tokenizer, prompt.stops)
        found = request.search.results()
        if prompt.has_grammar:  # a beam that never ended may say anything
            found = [one for one in found if one.stop_reason] or found
        best, *others = (text.whole(one) for one in found)
        return Caption(
            best.text,
            best.token_ids,
            best.stop_reason,
            best.score,
            best.logprobs,
            timings={"image": prompt.image_seconds, **seconds},
            counts={
                "prompt_tokens": len(request.embeds),
                "image_tokens": prompt.image_tokens,
                "new_tokens": len(best.token_ids),
            },
            seed=request.search.seed,
            alternatives=tuple(others),
        )
