"""The common part of families that answer questions: the Hub's graphs, prompt and files.

Their prompt, pixels and files are Hugging Face's own. A family reads its checkpoint, and defines
its tower, its image processor and the tokens of an image in a prompt.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from tokenizers import Tokenizer

from vlmport.bundle import Dims, GenerationSpec, PixelSpec, PromptSpec
from vlmport.bundle.manifest import CaptionMessage
from vlmport.checkpoint import Checkpoint, HeadNames, LazyTensor
from vlmport.errors import ConfigError
from vlmport.families.base import (
    Family,
    Graphs,
    HubFiles,
    decoder_dims,
    pixel_spec,
    without_sampling,
)
from vlmport.families.generation_config import Generation
from vlmport.families.templates import token_after_answers
from vlmport.graph.builder import GraphBuilder
from vlmport.graph.decoder import decoder_graph, embed_graph
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.parameters import Format
from vlmport.graph.precision import Precision

CONFIG = "config.json"
IMAGE_TOKEN_ID = "image_token_id"
# Keys of config.json that the export writes itself, or that belong to other programs.
DROPPED = frozenset({"auto_map", "text_config", "vision_config", "transformers.js_config"})


@dataclass(frozen=True)
class AnsweringConfig:
    """The keys of config.json, other than its two sub-configs, that every such family has."""

    image_token_id: int
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class AnsweringFamily(Family):
    """A model that answers questions about images, read from a checkpoint.

    Attributes:
        hub_names: the prefix of the names of Hugging Face's classes.
        token_keys: keys of config.json → the tokens whose ids they are; IMAGE_TOKEN_ID is one.
        question: the text that asks for a caption.
        most_new_tokens: the maximum of its model card, if the checkpoint has none.
        raw: config.json.
    """

    hub_names: ClassVar[str]
    token_keys: ClassVar[Mapping[str, str]]
    question: ClassVar[str]
    most_new_tokens: ClassVar[int]

    config: AnsweringConfig
    text: DecoderConfig
    settings: Generation
    chat_template: str
    raw: Mapping[str, Any]

    # What a family defines

    @abstractmethod
    def vision_encoder(self, form: Format) -> GraphBuilder:
        """Write the graph: outputs of the image processor → image_features f32[T, D]."""

    @property
    @abstractmethod
    def resample(self) -> int:
        """Pillow's code of the filter that images are resized with."""

    @abstractmethod
    def hub_sections(self) -> Mapping[str, Mapping[str, Any]]:
        """vision_config and text_config, with every size that a client may read."""

    @abstractmethod
    def hub_pixels(self) -> Mapping[str, Any]:
        """preprocessor_config.json, without the keys that all families have."""

    def hub_processor(self) -> Mapping[str, Any]:
        """processor_config.json, without the keys that all families have."""
        return {}

    # Reading

    def check_token_ids(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError if config.json has other ids of tokens than the tokenizer.

        Clients find images in a rendered prompt by these ids.
        """
        known = {key: tokenizer.token_to_id(token) for key, token in self.token_keys.items()}
        given = {key: getattr(self.config, key) for key in known}
        rows = self.text.vocab_size
        wrong = [
            f"{key} {given[key]}, {token!r} is {known[key]} in the tokenizer"
            for key, token in self.token_keys.items()
            if given[key] != known[key]
        ]
        wrong = wrong or [
            f"{key} {one}, the embedding has {rows} rows"
            for key, one in given.items()
            if one >= rows
        ]
        if wrong:
            raise ConfigError(
                f"{CONFIG}: {'; '.join(wrong)}",
                hint="config.json and the tokenizer must come from one model",
                code="config.contradiction",
            )

    # Weights

    @property
    def head(self) -> HeadNames:
        return HeadNames.of("", self.text.tie_word_embeddings)

    def with_weights(self, tensors: Mapping[str, LazyTensor]) -> Self:
        tied = self.head.are_tied(tensors)
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, tie_word_embeddings=tied),
            text=dataclasses.replace(self.text, tie_word_embeddings=tied),
        )

    # Graphs

    def graphs(self, precision: Precision) -> Graphs:
        return {
            "vision_encoder": self.vision_encoder(precision.vision),
            "embed_tokens": embed_graph(self.text, "", precision.embed),
            "decoder_model_merged": decoder_graph(self.text, "", precision.decoder, precision.head),
        }

    def is_unused(self, key: str) -> bool:
        return False

    # What runtimes need to know

    @property
    def dims(self) -> Dims:
        return decoder_dims(self.text)

    @property
    def prompt(self) -> PromptSpec:
        token = self.config.image_token_id
        caption: CaptionMessage = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": self.question}],
        }
        return PromptSpec(self.token_keys[IMAGE_TOKEN_ID], token, token, (caption,))

    @property
    def generation(self) -> GenerationSpec:
        return self.settings.spec(self.most_new_tokens, processors_see_prompt=True)

    @property
    def pixels(self) -> PixelSpec:
        return pixel_spec(self.resample)

    def hub_files(self) -> HubFiles:
        """The files of Hugging Face's own layout, whose graphs and prompt ours are."""
        processor, sections = f"{self.hub_names}Processor", self.hub_sections()
        return HubFiles(
            config={
                **{key: value for key, value in self.raw.items() if key not in DROPPED},
                **dataclasses.asdict(self.config),
                "eos_token_id": list(self.settings.stop_token_ids),
                "pad_token_id": self.settings.pad_token_id,
                **{key: without_sampling(section) for key, section in sections.items()},
            },
            preprocessor_config={
                "processor_class": processor,
                "do_convert_rgb": True,
                "do_resize": True,
                "do_rescale": True,
                "do_normalize": True,
                **self.hub_pixels(),
            },
            processor_config={"processor_class": processor, **self.hub_processor()},
            generation_config=self.settings.hub_config(self.generation.max_new_tokens),
            chat_template=self.chat_template,
            new_tokens=(),
            pipeline_tag="image-text-to-text",
            description="a vision-language model",
        )


def listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tuples into lists, as in JSON."""
    return {key: list(one) if isinstance(one, tuple) else one for key, one in values.items()}


def answer_settings(
    checkpoint: Checkpoint,
    text: Mapping[str, Any],
    template: str,
    tokenizer: Tokenizer,
    eos_token: str | None = None,
) -> Generation:
    """Read when the model stops and how it samples.

    The stop ids include the tokenizer's eos_token and the token that the template writes after an
    answer: no text continues after these.

    Args:
        text: the decoder's section of config.json.
        eos_token: default of the tokenizer's class, if no file names one.

    Raises:
        ConfigError: no file has a stop token, or one has a wrong value.
    """
    settings = Generation.read(checkpoint, text, f"{CONFIG}: text_config")
    token = _eos_token(checkpoint, eos_token)
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    others = (found, token_after_answers(template, checkpoint, tokenizer))
    ids = dict.fromkeys((*settings.stop_token_ids, *(one for one in others if one is not None)))
    return dataclasses.replace(settings, stop_token_ids=tuple(ids))


def _eos_token(checkpoint: Checkpoint, default: str | None) -> Any:
    """Find it as transformers 5.23 does: older tokenizer_configs need special_tokens_map.json."""
    config = checkpoint.json("tokenizer_config.json") or {}
    token = config.get("eos_token", default)
    if "added_tokens_decoder" not in config:
        token = (checkpoint.json("special_tokens_map.json") or {}).get("eos_token", token)
    return token.get("content") if isinstance(token, dict) else token
