"""`VLM`: a bundle that is open, and that captions images and answers questions about them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast, overload

from vlmport.bundle import Bundle
from vlmport.errors import ImageError, PromptError
from vlmport.runtime.conversation import Conversation
from vlmport.runtime.decoding.generate_options import GenerateOptions
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.engines.trust import trust
from vlmport.runtime.engines.tuned import Tuning
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.images.features import MAX_BYTES, FeatureCache
from vlmport.runtime.messages import Message
from vlmport.runtime.preparing import PreparedRequest, Preparer, refuse_several
from vlmport.runtime.prompt import Prompter
from vlmport.runtime.response import Answer, Caption, Response

if TYPE_CHECKING:
    from vlmport.runtime.images.reading import ImageSource

__all__ = ["VLM", "Answer", "Caption", "Response"]

BATCH_SIZE = 8


class VLM:
    """A vision-language model that is open and ready to run.

        model = vlmport.load("shapes-smolvlm")
        print(model.caption("photo.jpg"))
        print(model.conversation().ask("What is it?", ["photo.jpg"]))

    `vlmport.load` opens one from any source; `VLM.open` opens a bundle. Use `with`, or call
    `close`, to release its memory.

    Threads may share one model: several may call `caption`, `caption_each`, `generate` and `stream`
    at the same time, and each answer is what it would be alone. A conversation and an iterator
    belong to one thread at a time. Close the model when no thread uses it any more.

    Attributes:
        components: the graphs, as ONNX Runtime sessions.
        preparer: chat template, tokenizer, and the cache of recently encoded images.
        tuning: the choices of `vlmport tune` that it runs with; None where `load` found none.
    """

    def __init__(
        self,
        components: Components,
        *,
        image_cache_bytes: int = MAX_BYTES,
        tuning: Tuning | None = None,
    ):
        """Make a model of graphs that are open; `VLM.open` opens them.

        Raises OptionError where `image_cache_bytes` is no whole number from 0 on.
        """
        self.components, self.tuning = components, tuning
        self.preparer = Preparer(components, image_cache_bytes)

    def __repr__(self) -> str:
        manifest = self.components.manifest
        return (
            f"VLM({manifest.name!r}, family={manifest.family!r}, precision={self.precision!r}, "
            f"device={self.device!r}{', tuned' * (self.tuning is not None)})"
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        image_cache_bytes: int = MAX_BYTES,
        tuning: Tuning | None = None,
    ) -> VLM:
        """Open a bundle. `vlmport.load` also takes checkpoints, Hub ids and built-in names.

        Args:
            bundle: a bundle, or its folder.
            precision: 'auto' (the bundle's choice for the device), one of `precisions`, or a mix
                such as 'vision=q4,decoder=fp32'.
            device: 'cpu', 'cuda:1', 'openvino:bf16', …, as far as it is installed, or a mix such as
                'vision=openvino:bf16,decoder=cpu'. Any other than 'cpu' is compared with it first
                (docs/engines.md).
            threads: number of threads of ONNX Runtime; None for one per core.
            image_cache_bytes: maximum size in bytes of the cache of encoded images (default
                256 MB, 0 = none). An image in it is not encoded again; the least recently used is
                removed first.
            tuning: what `vlmport tune` found; used instead of precision, device and threads.

        Returns:
            The model.

        Raises:
            BundleError: the folder is no bundle, is damaged, or lacks the precision.
            DeviceError: the device is not available here, or computes a component wrongly.
            TokenizerError: the bundle's tokenizer or chat template can't be read.
            OptionError: a number is out of its range.
        """
        older = False
        if tuning is not None:
            precision, device, threads = tuning.precision, tuning.device, tuning.threads
            older = tuning.older_attention
        components = Components.open(
            bundle, precision=precision, device=device, threads=threads, older_attention=older
        )
        trust(components)
        return cls(components, image_cache_bytes=image_cache_bytes, tuning=tuning)

    @property
    def prompter(self) -> Prompter:
        """The chat template and the tokenizer."""
        return self.preparer.prompter

    @property
    def features(self) -> FeatureCache:
        """The cache of recently encoded images."""
        return self.preparer.features

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the whole bundle exists in."""
        return self.components.manifest.precisions

    @property
    def precision(self) -> str:
        """The precision that runs, or the mix of them."""
        return self.components.precision

    @property
    def device(self) -> str:
        """The device that it runs on, such as 'cpu' or 'cuda:1', or the mix of them."""
        return self.components.device

    @property
    def engines(self) -> dict[str, str]:
        """Each component with the engine that it runs on, such as 'cpu' or 'openvino:bf16'."""
        return {name: str(engine) for name, engine in self.components.engines.items()}

    def close(self) -> None:
        """Release the sessions, and empty the cache of images."""
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
        **options: Unpack[GenerateOptions],
    ) -> Response: ...
    @overload
    def caption(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Response]: ...
    def caption(
        self,
        images: Any,
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Response | list[Response]:
        """Caption one image, or several.

            model.caption("photo.jpg", max_new_tokens=30)
            model.caption(["a.jpg", "b.jpg"], num_beams=3)

        Args:
            images: a path, an address (file:// or data:), bytes, a PIL image or an array
                uint8[height, width, 3]; or a list of these.
            batch_size: number of images that are generated together (default 8). The captions do
                not depend on it; memory grows with it, and not with the number of images.
            image_options: options of the image processor, over the bundle's `image_options`.
            **options: how tokens are chosen, see GenerationOptions; over the bundle's defaults.

        Returns:
            One Response for one image; a list of them, in order, for a list.

        Raises:
            ImageError: an image can't be read or processed; nothing of its batch is generated.
            PromptError: the prompt does not fit into the context.
            OptionError: an option is unknown, out of its range, or contradicts another.
        """
        if not isinstance(images, list | tuple):
            alone = self.caption(
                [images], batch_size=batch_size, image_options=image_options, **options
            )
            return alone[0]
        captions: list[Response] = []
        for batch in self._batches(images, batch_size, image_options, options):
            for prompt in batch:
                if not isinstance(prompt, PreparedRequest):
                    raise prompt
            captions += self._run(
                [prompt for prompt in batch if isinstance(prompt, PreparedRequest)]
            )
        return captions

    def caption_each(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = BATCH_SIZE,
        image_options: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Response | ImageError | PromptError]:
        """Caption images one batch after the other, and continue after a bad one.

            for path, result in zip(paths, model.caption_each(paths), strict=True):
                print(path, result)

        Args:
            images: images, as `caption` takes them; any iterable, read a batch at a time.
            batch_size: number of images that are generated together (default 8).
            image_options: options of the image processor, over the bundle's `image_options`.
            **options: how tokens are chosen, see GenerationOptions; over the bundle's defaults.

        Returns:
            An iterator over one result for each image, in order: a Response, or the ImageError or
            PromptError that says why this image has none.

        Raises:
            OptionError: as `caption` does, and at once, not at the first caption.
        """
        return self._results(self._batches(images, batch_size, image_options, options))

    def _results(
        self, batches: Iterable[Sequence[PreparedRequest | ImageError | PromptError]]
    ) -> Iterator[Response | ImageError | PromptError]:
        for batch in batches:
            captions = iter(self._run([one for one in batch if isinstance(one, PreparedRequest)]))
            for one in batch:
                yield next(captions) if isinstance(one, PreparedRequest) else one

    def _batches(
        self,
        images: Iterable[ImageSource],
        batch_size: int,
        image_options: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> Iterator[list[PreparedRequest | ImageError | PromptError]]:
        """Prepare prompts for captions, batch by batch; a bad image gives its error instead."""
        size = whole_number("batch_size", batch_size, 1)
        decoding = self.preparer.decoding(options)
        if image_options:
            self.components.check_image_options(image_options)
        asked = self.components.manifest.prompt.caption

        def prepared(image: ImageSource) -> PreparedRequest | ImageError | PromptError:
            try:
                return self.preparer.prepare(asked, [image], decoding, image_options)
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
        **options: Unpack[GenerateOptions],
    ) -> Response:
        """Answer a list of chat messages.

            question = {"type": "text", "text": "What is it?"}
            message = {"role": "user", "content": [{"type": "image"}, question]}
            model.generate([message], ["photo.jpg"])

        Args:
            messages: messages in Hugging Face's or OpenAI's form (docs/conversations.md). Each part
                `{"type": "image"}` takes the next of `images`.
            images: images, as `caption` takes them.
            image_options: options of the image processor, over the bundle's `image_options`.
            **options: how tokens are chosen, see GenerationOptions; over the bundle's defaults.

        Returns:
            The answer.

        Raises:
            ImageError: an image can't be read or processed.
            PromptError: a message is malformed, images and placeholders differ in number, or the
                prompt does not fit into the context.
            OptionError: an option is unknown, out of its range, or contradicts another.
        """
        decoding = self.preparer.decoding(options)
        return self._run([self.preparer.prepare(messages, images, decoding, image_options)])[0]

    def conversation(
        self,
        system: str | None = None,
        *,
        image_options: Mapping[str, Any] | None = None,
        drop_oldest: bool = False,
    ) -> Conversation:
        """Start a conversation.

            chat = model.conversation("Answer in one word.")
            chat.ask("What color is the square?", images=["red_square.png"])

        Args:
            system: a system message, or None.
            image_options: options of the image processor for all images of the conversation, over
                the bundle's `image_options`.
            drop_oldest: forget the oldest questions and answers, and their images, where a question
                would not fit into the context (default False: that is a PromptError).

        Returns:
            An empty conversation.

        Raises:
            OptionError: the image processor has no such option.
            PromptError: the system message is no text.
        """
        return Conversation(
            self.preparer, system, image_options=image_options, drop_oldest=drop_oldest
        )

    def stream(
        self,
        image: ImageSource | None = None,
        *,
        messages: Sequence[Message] | None = None,
        images: Sequence[ImageSource] = (),
        image_options: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[str]:
        """Caption an image, or answer messages, and give the text piece by piece.

            for piece in model.stream("photo.jpg"):
                print(piece, end="", flush=True)

        All pieces together are the text that `caption` or `generate` returns. Close the iterator,
        at any piece, to end the work.

        Args:
            image: an image to caption, as `caption` takes it; or None with `messages`.
            messages: messages to answer, as `generate` takes them.
            images: the images of `messages`.
            image_options: options of the image processor, over the bundle's `image_options`.
            **options: how tokens are chosen, see GenerationOptions; over the bundle's defaults.

        Returns:
            An iterator over pieces of text.

        Raises:
            ImageError, PromptError, OptionError: as `caption` and `generate` do, and at once, not
                at the first piece. OptionError also for several beams or sequences: which of them
                is best is known at the end.
        """
        if (image is None) == (messages is None):
            raise PromptError(
                "stream needs either an image or messages",
                hint="stream(image) or stream(messages=[…], images=[…])",
                code="option.contradiction",
            )
        if messages is None:
            messages, images = self.components.manifest.prompt.caption, [cast(Any, image)]
        decoding = self.preparer.decoding(options)
        refuse_several(decoding.options)
        return self._pieces(self.preparer.prepare(messages, images, decoding, image_options))

    def _pieces(self, prompt: PreparedRequest) -> Iterator[str]:
        generation = Generation(self.components, [prompt.request])
        try:
            yield from self.preparer.pieces(prompt, generation)
        finally:
            prompt.request.cancel()

    def _run(self, prompts: Sequence[PreparedRequest]) -> list[Response]:
        generation = Generation(self.components, [prompt.request for prompt in prompts])
        generation.run()
        for prompt in prompts:
            self.preparer.warn_of_a_cut(prompt)
        return [self.preparer.response(prompt, generation.seconds) for prompt in prompts]
