"""Faults of an exporter and of a runtime, each of which one rung must see first.

`BUNDLE` breaks a copy of a bundle at a precision, `RUNTIME` the code that runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.parity.surgery import append_to_output, edit_graph, edit_tensor, renewed, swap_outputs
from vlmport.bundle import Bundle, GenerationSpec, PromptSpec
from vlmport.parity.ladders import hub
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.prompt import Prompter

IMAGE, VISION, EMBED = "image_processor", "vision_encoder", "embed_tokens"
DECODER = "decoder_model_merged"


def scaled(bundle: Bundle, component: str, weight: str, factor: float, precision: str) -> Bundle:
    """One matrix times a factor: itself in fp32, its scales where it is rounded."""
    name = weight if precision == "fp32" else f"{weight}_scales"
    return edit_tensor(bundle, component, name, lambda x: (x * factor).astype(x.dtype), precision)


def with_prompt(bundle: Bundle, change: Callable[[PromptSpec], PromptSpec]) -> Bundle:
    return renewed(bundle, lambda m: dataclasses.replace(m, prompt=change(m.prompt)))


def with_generation(bundle: Bundle, change: Callable[[GenerationSpec], GenerationSpec]) -> Bundle:
    return renewed(bundle, lambda m: dataclasses.replace(m, generation=change(m.generation)))


# What files hold


def fewer_ids(bundle: Bundle, precision: str) -> Bundle:
    return edit_tensor(bundle, IMAGE, "image_token_ids", lambda ids: ids[:-1])


def one_other_id(bundle: Bundle, precision: str) -> Bundle:
    return edit_tensor(
        bundle, IMAGE, "image_token_ids", lambda ids: np.where(np.arange(len(ids)) == 3, 1, ids)
    )


def wrong_image_token(bundle: Bundle, precision: str) -> Bundle:
    """The reference's prompt is made with the manifest's id, the graph's with the true one."""
    return with_prompt(bundle, lambda prompt: dataclasses.replace(prompt, image_token_id=7))


def change_pixels(bundle: Bundle, operator: str, value: np.ndarray) -> Bundle:
    return edit_graph(
        bundle, IMAGE, lambda model: append_to_output(model, "pixel_values", operator, value)
    )


def no_mean(bundle: Bundle, precision: str) -> Bundle:
    """(x - mean) / std, without the mean of 0.5, is one more."""
    return change_pixels(bundle, "Add", np.float32(1))


def other_std(bundle: Bundle, precision: str) -> Bundle:
    return change_pixels(bundle, "Mul", np.float32(0.5 / 0.505))


def levels_off(bundle: Bundle, values: int, levels: int) -> Bundle:
    """Some of the values, by so many of the 255 levels of the range from -1 to 1."""
    path = bundle.path(bundle.variant(IMAGE, "any").model)
    (output,) = (one for one in onnx.load(path).graph.output if one.name == "pixel_values")
    change = np.zeros([dim.dim_value or 1 for dim in output.type.tensor_type.shape.dim], np.float32)
    change[0, 1, 12, :values] = levels * 2 / 255
    return change_pixels(bundle, "Add", change)


def one_level_off(bundle: Bundle, precision: str) -> Bundle:
    """One value, by the least that a resize can be wrong by."""
    return levels_off(bundle, 1, 1)


def bgr(bundle: Bundle, precision: str) -> Bundle:
    """Swap red and blue at the graph's input."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                node.input[at] = "swapped" if name == "image" else name
        order = onnx.helper.make_tensor("order", onnx.TensorProto.INT64, [3], [2, 1, 0])
        model.graph.initializer.append(order)
        gather = onnx.helper.make_node("Gather", ["image", "order"], ["swapped"], axis=2)
        model.graph.node.insert(0, gather)

    return edit_graph(bundle, IMAGE, change)


def zero_vision_weight(bundle: Bundle, precision: str) -> Bundle:
    return scaled(bundle, VISION, "layers.1.mlp.fc2.weight", 0, precision)


def scaled_vision_weight(bundle: Bundle, precision: str) -> Bundle:
    return scaled(bundle, VISION, "layers.1.mlp.fc1.weight", 1.2, precision)


def swap_embeddings(bundle: Bundle, precision: str) -> Bundle:
    """Two rows of all."""

    def swap(table: np.ndarray) -> np.ndarray:
        table[[40, 41]] = table[[41, 40]]
        return table

    name = "embed_tokens.weight" if precision == "fp32" else "embed_tokens.weight_quantized"
    return edit_tensor(bundle, EMBED, name, swap, precision)


def zero_decoder_weight(bundle: Bundle, precision: str) -> Bundle:
    return scaled(bundle, DECODER, "layers.1.self_attn.o_proj.weight", 0, precision)


def caches_of_wrong_layers(bundle: Bundle, precision: str) -> Bundle:
    return edit_graph(
        bundle, DECODER, lambda m: swap_outputs(m, "present.0.key", "present.1.key"), precision
    )


def stops_early(bundle: Bundle, precision: str, token: int = 44) -> Bundle:
    """A stop id more than the model has."""
    return with_generation(
        bundle, lambda spec: dataclasses.replace(spec, stop_token_ids=(0, token))
    )


def never_stops(bundle: Bundle, precision: str) -> Bundle:
    return with_generation(bundle, lambda spec: dataclasses.replace(spec, stop_token_ids=()))


def two_pictures_asked(bundle: Bundle, precision: str) -> Bundle:
    """The manifest's caption messages hold a picture too many."""
    return with_prompt(bundle, lambda spec: dataclasses.replace(spec, caption=spec.caption * 2))


BUNDLE: list[tuple[str, Callable[[Bundle, str], Bundle]]] = [
    ("prompt_ids", fewer_ids),
    ("prompt_ids", one_other_id),
    ("pixels", no_mean),
    ("pixels", other_std),
    ("pixels", one_level_off),
    ("pixels", bgr),
    ("vision_features", zero_vision_weight),
    ("vision_features", scaled_vision_weight),
    ("merged_embeds", swap_embeddings),
    ("first_logits", zero_decoder_weight),
    ("cached_decode", caches_of_wrong_layers),
    ("greedy_tokens", stops_early),
    ("greedy_tokens", never_stops),
    ("end_to_end", two_pictures_asked),
]


# What no file holds: the runtime


def shifted_positions(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    plain = Components.position_ids

    def shifted(*args, **options):
        positions = plain(*args, **options)
        return dataclasses.replace(positions, ids=positions.ids + 1)

    patch.setattr(Components, "position_ids", shifted)


def positions_of_steps_that_restart(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    """Right in the prompt; the cache's steps count from 0 again."""
    plain = KeyValueCache.step

    def restarting(self, embeds):
        self.rope_deltas = [-prompt_tokens] * self.rows
        return plain(self, embeds)

    patch.setattr(KeyValueCache, "step", restarting)


def features_in_another_order(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    plain = hub.merge_image_features

    def backwards(embeds, ids, features, token):
        return plain(embeds, ids, features[::-1], token)

    patch.setattr(hub, "merge_image_features", backwards)


def cache_not_fed_back(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    plain = Components.decode

    def forgetful(self, embeds, mask, positions, past=None, num_logits_to_keep=0):
        past = past and {name: np.zeros_like(value) for name, value in past.items()}
        return plain(self, embeds, mask, positions, past, num_logits_to_keep)

    patch.setattr(Components, "decode", forgetful)


def positions_that_restart_with_each_chunk(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    plain = Components.decode

    def restarting(self, embeds, mask, positions, past=None, num_logits_to_keep=0):
        positions = np.arange(embeds.shape[1])[None]
        return plain(self, embeds, mask, positions, past, num_logits_to_keep)

    patch.setattr(Components, "decode", restarting)


def logits_kept_of_the_wrong_row(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    """num_logits_to_keep = 1 must give the last position's."""
    plain = Components.decode

    def first_row(self, embeds, mask, positions, past=None, num_logits_to_keep=0):
        logits, presents = plain(self, embeds, mask, positions, past)
        return logits[:, :num_logits_to_keep] if num_logits_to_keep else logits, presents

    patch.setattr(Components, "decode", first_row)


def cache_that_forgets(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    """The runtime's own cache writes each new token over the last of the prompt."""
    plain = KeyValueCache.step

    def stuck(self, embeds):
        self.lengths = [prompt_tokens - 1] * self.rows
        return plain(self, embeds)

    patch.setattr(KeyValueCache, "step", stuck)


def cache_that_mixes_rows(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    """A fault of batches alone: one picture at a time never shows it."""
    plain = KeyValueCache.step

    def mixed(self, embeds):
        for buffer in self.buffers:
            buffer[:] = buffer[0]
        return plain(self, embeds)

    patch.setattr(KeyValueCache, "step", mixed)


def a_token_too_many(patch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    """A BOS before the picture, as some ports of this model have it."""
    plain = Prompter.encode
    patch.setattr(Prompter, "encode", lambda self, text: np.insert(plain(self, text), 0, 0))


RUNTIME: list[tuple[str, Callable[[pytest.MonkeyPatch, int], None]]] = [
    ("position_ids", shifted_positions),
    ("merged_embeds", features_in_another_order),
    ("cached_decode", cache_not_fed_back),
    ("cached_decode", positions_that_restart_with_each_chunk),
    ("cached_decode", logits_kept_of_the_wrong_row),
    ("cached_decode", positions_of_steps_that_restart),
    ("cached_decode", cache_that_forgets),
    ("cached_decode", cache_that_mixes_rows),
    ("end_to_end", a_token_too_many),
]
