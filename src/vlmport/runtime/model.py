"""`VLM`: open a bundle, ask it about pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, overload

from vlmport.bundle import Bundle
from vlmport.errors import ImageError, PromptError
from vlmport.runtime.conversation import Conversation
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.images.features import MAX_BYTES, FeatureCache
from vlmport.runtime.messages import Message
from vlmport.runtime.preparing import Asker, Prompt, refuse_several
from vlmport.runtime.prompt import Prompter
from vlmport.runtime.response import Answer, Caption

if TYPE_CHECKING:
    from vlmport.runtime.images.reading import ImageSource

__all__ = ["VLM", "Answer", "Caption"]

BATCH_SIZE = 8


class VLM:
    """A bundle, ready to run.

    Threads may share one model: `caption`, `caption_each`, `generate` and `stream` may be called
    by several at the same time, and each answer is what it would be alone. A conversation and an
    iterator belong to one thread at a time. Close the model when no thread uses it any more.

    Attributes:
        components: its graphs.
        asker: its chat template and tokenizer, and the cache of recently encoded pictures.
    """

    def __init__(self, components: Components, *, image_cache_bytes: int = MAX_BYTES):
        """Raises OptionError where `image_cache_bytes` is no whole number from 0 on."""
        self.components = components
        self.asker = Asker(components, image_cache_bytes)

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        image_cache_bytes: int = MAX_BYTES,
    ) -> VLM:
        """Open a bundle folder.

        Args:
            precision: 'auto' (the bundle's choice for the device), one of `precisions`, or a mix
                such as 'vision=q4,decoder=fp32'.
            device: 'cpu', 'cuda', 'cuda:1', 'coreml', 'directml', 'webgpu', …
            threads: within an operator; None for one per core.
            image_cache_bytes: maximum size of the cache of encoded pictures (default 256 MB,
                0 = none): a picture in it is not encoded again. The least recently used go first.

        Raises BundleError, DeviceError, TokenizerError or OptionError.
        """
        components = Components.open(bundle, precision=precision, device=device, threads=threads)
        return cls(components, image_cache_bytes=image_cache_bytes)

    @property
    def prompter(self) -> Prompter:
        """Its chat template and tokenizer."""
        return self.asker.prompter

    @property
    def features(self) -> FeatureCache:
        """The cache of recently encoded pictures."""
        return self.asker.features

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
        self,
        images: ImageSource,
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Caption: ...
    @overload
    def caption(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Caption]: ...
    def caption(
        self,
        images: Any,
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Caption | list[Caption]:
        """Caption one picture, or several.

        Args:
            batch_size: pictures that are generated together. Each has the caption that it would
                have alone; memory grows with this number, not with that of the pictures.
            image_options: of the image processor, over the bundle's `image_options`.
            options: those of GenerationOptions, over the bundle's defaults.

        Raises ImageError, PromptError or OptionError, before its batch is generated.
        """
        if not isinstance(images, list | tuple):
            shared = {"batch_size": batch_size, "image_options": image_options}
            return self.caption([images], **shared, **options)[0]
        captions: list[Caption] = []
        for batch in self._batches(images, batch_size, image_options, options):
            for prompt in batch:
                if not isinstance(prompt, Prompt):
                    raise prompt
            captions += self._run([prompt for prompt in batch if isinstance(prompt, Prompt)])
        return captions

    def caption_each(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Caption | ImageError | PromptError]:
        """Captions in the order of the pictures, as their batches are done.

        Where a picture can't be captioned its error comes in its place, and the others are
        captioned all the same. Arguments are those of `caption`. Raises OptionError here, not at
        the first caption.
        """
        return self._results(self._batches(images, batch_size, image_options, options))

    def _results(
        self, batches: Iterable[Sequence[Prompt | ImageError | PromptError]]
    ) -> Iterator[Caption | ImageError | PromptError]:
        for batch in batches:
            captions = iter(self._run([one for one in batch if isinstance(one, Prompt)]))
            for one in batch:
                yield next(captions) if isinstance(one, Prompt) else one

    def _batches(
        self,
        images: Iterable[ImageSource],
        batch_size: int,
        image_options: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> Iterator[list[Prompt | ImageError | PromptError]]:
        """Prompts for captions, or what is wrong with a picture, batch by batch."""
        size = whole_number("batch_size", batch_size, 1)
        decoding = self.asker.decoding(options)
        if image_options:
            self.components.check_image_options(image_options)
        asked = self.components.manifest.prompt.caption

        def prepared(image: ImageSource) -> Prompt | ImageError | PromptError:
            try:
                return self.asker.prompt(asked, [image], decoding, image_options)
            except (ImageError, PromptError) as error:
                return error

        rest = iter(images)
        return iter(lambda: [prepared(image) for image in itertools.islice(rest, size)], [])

    def generate(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource] = (),
        *,
        image_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Caption:
        """Answer messages. Each part `{"type": "image"}` takes the next of `images`.

        Options are those of GenerationOptions, over the bundle's defaults; `image_options` are of
        the image processor.

        Raises ImageError, PromptError or OptionError, before anything is generated.
        """
        decoding = self.asker.decoding(options)
        return self._run([self.asker.prompt(messages, images, decoding, image_options)])[0]

    def conversation(
        self,
        system: str | None = None,
        *,
        image_options: Mapping[str, Any] | None = None,
        drop_oldest: bool = False,
    ) -> Conversation:
        """A conversation that begins with nothing but, perhaps, a system message.

        Args:
            drop_oldest: forget the oldest questions and answers, their images included, where a
                question would not fit into the context; else that is an error.

        Raises OptionError for image options that the image processor does not have.
        """
        return Conversation(
            self.asker, system, image_options=image_options, drop_oldest=drop_oldest
        )

    def stream(
        self,
        image: ImageSource | None = None,
        *,
        messages: Sequence[Message] | None = None,
        images: Sequence[ImageSource] = (),
        image_options: Mapping[str, Any] | None = None,
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
                code="option.contradiction",
            )
        if messages is None:
            messages, images = self.components.manifest.prompt.caption, [cast(Any, image)]
        decoding = self.asker.decoding(options)
        refuse_several(decoding.options)
        return self._pieces(self.asker.prompt(messages, images, decoding, image_options))

    def _pieces(self, prompt: Prompt) -> Iterator[str]:
        generation = Generation(self.components, [prompt.request])
        try:
            yield from self.asker.pieces(prompt, generation)
        finally:
            prompt.request.cancel()

    def _run(self, prompts: Sequence[Prompt]) -> list[Caption]:
        generation = Generation(self.components, [prompt.request for prompt in prompts])
        generation.run()
        for prompt in prompts:
            self.asker.warn_of_a_cut(prompt)
        return [self.asker.caption(prompt, generation.seconds) for prompt in prompts]
