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
from vlmport.errors import ImageError, PromptError
from vlmport.runtime.components import Components, merge_image_features
from vlmport.runtime.features import FeatureCache
from vlmport.runtime.generate import Generation, Row, StopReason, most_new_tokens, new_row
from vlmport.runtime.images import open_image
from vlmport.runtime.options import GenerationOptions, whole_number
from vlmport.runtime.prompt import Message, Prompter, check_messages
from vlmport.runtime.text import TextStream

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from vlmport.runtime.images import ImageSource

BATCH_SIZE = 8


@dataclass(frozen=True)
class Caption:
    """Generated text; `str()` gives it.

    Attributes:
        token_ids: as generated, the stop token included.
        stop_reason: 'stop' for a stop token, 'length' for max_new_tokens or a full context.
        timings: seconds in 'image' (reading and encoding), 'prefill' and 'decode'. Captions of
            one batch share the last two.
        counts: 'prompt_tokens', 'image_tokens' among them, and 'new_tokens'.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    timings: Mapping[str, float]
    counts: Mapping[str, int]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Prompt:
    """One prompt, ready to run."""

    row: Row
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
        """Caption one picture, or several; options are those of GenerationOptions.

        Args:
            batch_size: pictures that are generated together. Each has the caption that it would
                have alone; memory grows with this number, not with that of the pictures.

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
        checked = GenerationOptions.of(options)
        asked = self.components.manifest.prompt.caption

        def prepared(image: ImageSource) -> _Prompt | ImageError | PromptError:
            try:
                return self._prompt(asked, [image], checked)
            except (ImageError, PromptError) as error:
                return error

        rest = iter(images)
        return iter(lambda: [prepared(image) for image in itertools.islice(rest, size)], [])

    def generate(
        self, messages: Sequence[Message], images: Sequence[ImageSource] = (), **options: Any
    ) -> Caption:
        """Answer a conversation. Each part `{"type": "image"}` takes the next of `images`.

        Raises ImageError, PromptError or OptionError, before anything is generated.
        """
        prompt = self._prompt(messages, images, GenerationOptions.of(options))
        return self._run([prompt])[0]

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
        the arguments is raised here, not at the first piece.
        """
        if (image is None) == (messages is None):
            raise PromptError(
                "stream takes a picture or messages, one of them",
                hint="stream(picture) or stream(messages=[…], images=[…])",
            )
        if messages is None:
            messages, images = self.components.manifest.prompt.caption, [cast(Any, image)]
        prompt = self._prompt(messages, images, GenerationOptions.of(options))
        return self._pieces(Generation(self.components, [prompt.row]))

    def _pieces(self, generation: Generation) -> Iterator[str]:
        text = TextStream(self.prompter.tokenizer)
        for row, token in generation:
            if token not in row.stop_token_ids and (piece := text.push(token)):
                yield piece
        if piece := text.finish():
            yield piece

    def _prompt(
        self, messages: Sequence[Message], images: Sequence[Any], options: GenerationOptions
    ) -> _Prompt:
        """Template → ids with pictures spliced in → embeddings with features over image rows."""
        chat = check_messages(messages, images)
        text = self.prompter.encode(self.prompter.render(chat.messages))
        start = time.perf_counter()
        pictures = [self.features.process(open_image(image)) for image in chat.images]
        ids = self.prompter.splice(text, [picture.prompt_ids for picture in pictures])
        most_new_tokens(self.components, len(ids), options)  # refused here, it has cost little
        features = [self.features.encode(picture) for picture in pictures]
        seconds = time.perf_counter() - start
        row = new_row(self.components, self._embed(ids, features), options)
        row.positions = self.components.position_ids(ids)
        return _Prompt(row, sum(len(one) for one in features), seconds)

    def _embed(
        self, ids: Int64[np.ndarray, " S"], features: Sequence[Float[np.ndarray, "T D"]]
    ) -> Float[np.ndarray, "S D"]:
        embeds = self.components.embed(ids[None])[0]
        rows = np.concatenate(features) if features else np.zeros((0, embeds.shape[1]), np.float32)
        token = self.components.manifest.prompt.image_token_id
        return merge_image_features(embeds, ids, rows, token)

    def _run(self, prompts: Sequence[_Prompt]) -> list[Caption]:
        generation = Generation(self.components, [prompt.row for prompt in prompts])
        generation.run()
        return [self._caption(prompt, generation.seconds) for prompt in prompts]

    def _caption(self, prompt: _Prompt, seconds: Mapping[str, float]) -> Caption:
        row = prompt.row
        assert row.stop_reason is not None
        said = row.tokens[:-1] if row.stop_reason == "stop" else row.tokens
        return Caption(
            text=self.prompter.tokenizer.decode(said, skip_special_tokens=True),
            token_ids=tuple(row.tokens),
            stop_reason=row.stop_reason,
            timings={"image": prompt.image_seconds, **seconds},
            counts={
                "prompt_tokens": len(row.embeds),
                "image_tokens": prompt.image_tokens,
                "new_tokens": len(row.tokens),
            },
        )
