"""What the golden picture comes to at each graph that may hold float16, in each layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vlmport.bundle import Bundle
from vlmport.bundle.layouts import COMPONENTS, FUSED, GENAI, HUB
from vlmport.runtime.golden import golden_fused, golden_genai, golden_image, golden_prefix
from vlmport.runtime.graphs.components import DECODER, VISION, Components
from vlmport.runtime.layouts import components as four_files
from vlmport.runtime.layouts import fused, genai
from vlmport.runtime.probe import golden_prompt

Feeds = Iterator[tuple[str, Mapping[str, np.ndarray]]]


def golden_feeds(bundle: Bundle, precision: str) -> Feeds:
    """Component and inputs by name, those of a cache left out."""
    feeds = {
        HUB: _hub_feeds,
        COMPONENTS: _four_files_feeds,
        FUSED: _fused_feeds,
        GENAI: _genai_feeds,
    }
    return feeds[bundle.manifest.layout](bundle, precision)


def _hub_feeds(bundle: Bundle, precision: str) -> Feeds:
    golden = bundle.manifest.golden
    components = Components.open(bundle, precision=precision)
    vision = components.process_image(golden_image(golden), golden.options).inputs
    prompt = golden_prompt(components, golden)
    components.close()  # the wide graphs take their place in memory
    yield VISION, vision
    yield (
        DECODER,
        {
            "inputs_embeds": prompt.embeds[None],
            "attention_mask": np.ones((1, len(prompt.ids)), np.int64),
            "position_ids": prompt.positions.ids[..., None, :],
            "num_logits_to_keep": np.array(0, np.int64),
        },
    )


def _four_files_feeds(bundle: Bundle, precision: str) -> Feeds:
    """Going on computes as beginning does."""
    golden = bundle.manifest.golden
    files = four_files.FourFiles.open(bundle, precision=precision)
    pixels = files.pixels(golden_image(golden))
    yield four_files.VISION, {"pixel_values": pixels}
    yield four_files.PROJECTION, {"vision_hidden_states": files.encode(pixels).hidden[None]}
    prefix, none = golden_prefix(files, golden), np.zeros((1, 0), np.int64)
    yield four_files.BEGIN, {"prefix_embeddings": prefix[None], "input_ids": none}


def _fused_feeds(bundle: Bundle, precision: str) -> Feeds:
    """The golden prompt is image tokens alone, so its features are the whole of image_embeds."""
    golden = bundle.manifest.golden
    graphs = fused.Fused.open(bundle, precision=precision)
    pixels = graphs.pixels(golden_image(golden))
    ids, features = golden_fused(graphs, golden)
    graphs.close()
    yield fused.VISION, {"pixel_values": pixels}
    mask = np.ones((1, len(ids)), np.int64)
    yield fused.TEXT, {"input_ids": ids[None], "attention_mask": mask, fused.EMBEDS: features[None]}


def _genai_feeds(bundle: Bundle, precision: str) -> Feeds:
    golden = bundle.manifest.golden
    graphs = genai.GenaiGraphs.open(bundle, precision=precision)
    vision = graphs.process_image(golden_image(golden), golden.options).inputs
    prompt = golden_genai(graphs, golden)
    graphs.close()
    yield genai.VISION, vision
    yield (
        genai.DECODER,
        {
            "inputs_embeds": prompt.embeds[None],
            "attention_mask": np.ones((1, len(prompt.ids)), np.int64),
            "position_ids": prompt.positions.ids[:, None],
        },
    )
