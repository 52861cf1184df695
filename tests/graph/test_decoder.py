"""The decoder graph equals transformers' LlamaForCausalLM: in one pass, in chunks, in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.running import open_graph
from vlmport.errors import ConfigError
from vlmport.graph.decoder import DecoderConfig, decoder_graph, embed_graph

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "all heads, untied": {"num_key_value_heads": None, "tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "many heads": {"head_dim": 8, "num_attention_heads": 8},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "v4 theta": {"rope_theta": 250.0, "rms_norm_eps": 1e-2},
    "v5 theta": {"rope_parameters": {"rope_theta": 250.0, "rope_type": "default"}},
}
LONGEST = 12


@dataclass(frozen=True)
class Pair:
    """One model twice: in torch, and as graphs."""

    config: DecoderConfig
    torch: transformers.LlamaForCausalLM
    embed_session: ort.InferenceSession
    session: ort.InferenceSession

    def embeds(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.embed_session.run(None, {"input_ids": ids})[0])

    def empty(self, rows: int, length: int = 0) -> dict[str, np.ndarray]:
        shape = (rows, self.config.kv_heads, length, self.config.head_size)
        layers, halves = range(self.config.num_hidden_layers), ("key", "value")
        return {
            f"past_key_values.{i}.{half}": np.zeros(shape, np.float32)
            for i in layers
            for half in halves
        }

    def run(
        self,
        ids: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        past: dict[str, np.ndarray] | None = None,
        keep: int = 0,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and the cache under the names under which it is fed."""
        past = past or self.empty(len(ids))
        length = next(iter(past.values())).shape[2]
        S = ids.shape[1]
        if positions is None:
            positions = np.tile(np.arange(length, length + S), (len(ids), 1))
        feeds = {
            "inputs_embeds": self.embeds(ids),
            "attention_mask": np.ones((len(ids), length + S), np.int64) if mask is None else mask,
            "position_ids": positions.astype(np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        logits, *presents = map(np.asarray, self.session.run(None, feeds | past))
        return logits, dict(zip(past, presents, strict=True))

    def truth(self, ids: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        with torch.no_grad():
            where = None if positions is None else torch.from_numpy(positions)
            return self.torch(torch.from_numpy(ids), position_ids=where).logits.numpy()


def make(seed: int = 0, zero: str | None = None, **changes: Any) -> Pair:
    """A random model; `zero` names a weight that is zeroed in the graph only."""
    raw = {**BASE, **changes}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight) * (0.3 if weight.ndim == 2 else 0.1)
        weight.data = noise + 1 if "norm" in name else noise
    tensors = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    if zero is not None:
        tensors[zero] = np.zeros_like(tensors[zero])
    config = DecoderConfig.read(raw, "config.json")
    embedding = {name: tensors.pop(name) for name in ["model.embed_tokens.weight"]}
    return Pair(
        config,
        model,
        open_graph(embed_graph(config), embedding),
        open_graph(decoder_graph(config), tensors),
    )


def some_ids(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], shape)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(np.abs(expected).max()))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes: dict[str, Any]) -> None:
    pair, ids = make(**changes), some_ids(2, 9)
    assert_same(pair.run(ids)[0], pair.truth(ids))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_chunks_and_steps_equal_one_pass(changes: dict[str, Any]) -> None:
    pair, ids = make(**changes), some_ids(1, LONGEST)
    truth, past, at = pair.truth(ids), None, 0
    for size in (5, 1, 3, 1, 1, 1):
        logits, past = pair.run(ids[:, at : at + size], past=past)
        assert_same(logits, truth[:, at : at + size])
        at += size
    assert at == LONGEST


@pytest.mark.parametrize(
    "zeroed", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_the_comparison_can_fail(zeroed: str) -> None:
    pair, ids = make(zero=zeroed), some_ids(1, 9)
    with pytest.raises(AssertionError):
        assert_same(pair.run(ids)[0], pair.truth(ids))


def test_theta_is_read_in_both_spellings() -> None:
    assert DecoderConfig.read(CONFIGS["v4 theta"], "here").rope_theta == 250.0
    assert DecoderConfig.read(CONFIGS["v5 theta"], "here").rope_theta == 250.0
    ids = some_ids(1, 9)
    with pytest.raises(AssertionError):  # so that the comparisons above do see the angles
        assert_same(make(rope_theta=250.0).run(ids)[0], make().truth(ids))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_theta": 0.0},
        {"rope_theta": -1.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": ["default"]}},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5},
        {"hidden_act": "gelu"},
        {"rope_interleaved": True},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"head_dim": 12},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_maths_that_is_not_computed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        DecoderConfig.read({**BASE, **wrong}, "config.json: text_config")
    assert "config.json: text_config" in str(caught.value)
    assert caught.value.hint


@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=2, max_size=4),
    sides=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_padded_rows_equal_rows_alone(
    pair: Pair, lengths: list[int], sides: list[bool], seed: int
) -> None:
    """Left and right padding in one batch, then two steps that follow the padding."""
    rows = [some_ids(n + 2, seed=seed + n) for n in lengths]
    truths = [pair.truth(row[None])[0] for row in rows]
    B, S = len(rows), max(lengths)
    ids, mask, positions = (np.zeros((B, S), np.int64) for _ in range(3))
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        real = slice(S - n, S) if sides[b] else slice(0, n)
        ids[b, real], mask[b, real], positions[b, real] = row[:n], 1, np.arange(n)
    logits, past = pair.run(ids, mask=mask, positions=positions)
    for b, n in enumerate(lengths):
        assert_same(logits[b][mask[b] == 1], truths[b][:n])
    for step in range(2):
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        positions = np.array([[n + step] for n in lengths])
        ids = np.array([[row[n + step]] for row, n in zip(rows, lengths, strict=True)])
        logits, past = pair.run(ids, mask=mask, positions=positions, past=past)
        for b, n in enumerate(lengths):
            assert_same(logits[b, 0], truths[b][n + step])


def test_positions_may_start_anywhere_and_leave_gaps(pair: Pair) -> None:
    ids = some_ids(2, 6)
    positions = np.array([[7, 8, 9, 10, 11, 12], [300, 301, 302, 400, 401, 402]])
    truth = pair.truth(ids, positions)
    assert_same(pair.run(ids, positions=positions)[0], truth)
    _, past = pair.run(ids[:1, :4], positions=positions[:1, :4])
    assert_same(pair.run(ids[:1, 4:], positions=positions[:1, 4:], past=past)[0], truth[:1, 4:])
    with pytest.raises(AssertionError):
        assert_same(pair.run(ids, positions=positions % 50)[0], truth)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_only_the_last_logits_are_kept(pair: Pair, keep: int) -> None:
    ids = some_ids(2, 7)
    logits, past = pair.run(ids, keep=keep)
    assert_same(logits, pair.truth(ids)[:, -keep:])
    assert past["past_key_values.0.key"].shape == (2, 2, 7, 8)


def test_a_buffer_longer_than_the_text_is_written_in_place(pair: Pair) -> None:
    """Past and present in one preallocated buffer; rows of unequal length step together."""
    lengths, capacity = [3, 6], 20
    rows = [some_ids(n + 3, seed=n) for n in lengths]
    buffers = pair.empty(2, capacity)
    for name, buffer in buffers.items():
        buffer[...] = 1e4  # what a row has not written may not be read
        for b, row in enumerate(rows):
            _, past = pair.run(row[None, : lengths[b]])
            buffer[b, :, : lengths[b]] = past[name][0]
    filled = {name: buffer.copy() for name, buffer in buffers.items()}
    for step in range(3):
        at = np.array(lengths) + step
        logits = bound_step(
            pair, np.array([[r[n]] for r, n in zip(rows, at, strict=True)]), at, buffers
        )
        for b, row in enumerate(rows):
            assert_same(logits[b, 0], pair.truth(row[None])[0, at[b]])
    for name, buffer in buffers.items():
        for b, n in enumerate(lengths):
            changed = np.flatnonzero((buffer[b] != filled[name][b]).any(axis=(0, 2)))
            assert changed.tolist() == [n, n + 1, n + 2]


def bound_step(
    pair: Pair, ids: np.ndarray, at: np.ndarray, buffers: dict[str, np.ndarray]
) -> np.ndarray:
    """One token a row through IO binding, row b at position at[b]."""
    binding, value = pair.session.io_binding(), ort.OrtValue.ortvalue_from_numpy
    logits = np.empty((len(ids), 1, pair.config.vocab_size), np.float32)
    feeds = {
        "inputs_embeds": pair.embeds(ids),
        "attention_mask": (np.arange(at.max() + 1) <= at[:, None]).astype(np.int64),
        "position_ids": at[:, None].astype(np.int64),
        "num_logits_to_keep": np.array(1, np.int64),
    }
    held = {name: value(array) for name, array in (feeds | buffers).items()}
    for name, one in held.items():
        binding.bind_ortvalue_input(name, one)
    for name in buffers:
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), held[name])
    binding.bind_ortvalue_output("logits", value(logits))
    pair.session.run_with_iobinding(binding)
    return logits


def test_an_id_outside_the_embedding_is_an_error(pair: Pair) -> None:
    with pytest.raises(Exception, match="indices element out of data bounds"):
        pair.embeds(np.array([[BASE["vocab_size"]]]))
