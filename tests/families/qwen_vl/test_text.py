"""The decoder graph equals the text side of Qwen2.5-VL and Qwen3-VL in transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from tests.graph.running import open_graph
from vlmport.families.qwen_vl.text import Qwen2_5TextConfig, Qwen3TextConfig
from vlmport.graph.decoder import decoder_graph, embed_graph
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.parameters import FLOAT16, FLOAT32, INT4, W8A8, Format

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "deepstack_visual_indexes": [0],
}


@dataclass(frozen=True)
class Case:
    """A kind of model, and what is particular to a tiny one of it."""

    kind: str
    rope: dict[str, Any]
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    lanes: int = 0
    tied: bool = False

    @property
    def raw(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": 250.0, **self.rope}
        return {**BASE, **self.text, "tie_word_embeddings": self.tied, "rope_parameters": rope}

    @property
    def config(self) -> DecoderConfig:
        reader = Qwen3TextConfig if self.kind == "qwen3" else Qwen2_5TextConfig
        return dataclasses.replace(reader.read(self.raw, "here"), deepstack_lanes=self.lanes)

    def model(self) -> Any:
        """The model in torch, whole; its weights are random and large enough to matter."""
        torch.manual_seed(3)
        raw = {key: value for key, value in self.raw.items() if key != "tie_word_embeddings"}
        settings = {"text_config": raw, "vision_config": VISION, "tie_word_embeddings": self.tied}
        if self.kind == "qwen3":
            config = transformers.Qwen3VLConfig(**settings)
            model = transformers.Qwen3VLForConditionalGeneration(config)
        else:
            config = transformers.Qwen2_5_VLConfig(**settings)
            model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight) * (0.3 if weight.ndim == 2 else 0.2)
            weight.data = noise + 1 if "norm" in name else noise
        return model.eval()


SECTIONED = {"mrope_section": [2, 3, 3]}
INTERLEAVED = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
CASES = {
    "qwen2.5": Case("qwen2_5", SECTIONED),
    "qwen2.5, tied": Case("qwen2_5", {"mrope_section": [4, 2, 2]}, tied=True),
    "qwen2.5, two key heads": Case(
        "qwen2_5",
        SECTIONED,
        {"num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 2},
    ),
    "qwen3": Case("qwen3", INTERLEAVED, {"head_dim": 16}, lanes=2),
    "qwen3, tied, wide heads": Case(
        "qwen3",
        {"mrope_section": [6, 5, 5]},
        {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
        lanes=1,
        tied=True,
    ),
    "qwen3, a lane after each layer": Case("qwen3", INTERLEAVED, {"head_dim": 16}, lanes=3),
    "qwen3, biases, no lane": Case("qwen3", INTERLEAVED, {"head_dim": 16, "attention_bias": True}),
}


@dataclass(frozen=True)
class Prompt:
    """Rows of equal length without padding.

    Attributes:
        positions: i64[3, B, S].
        image: bool[B, S].
        features: f32[T, D·(1+n)], of the image rows, row after row.
    """

    ids: np.ndarray
    positions: np.ndarray
    image: np.ndarray
    features: np.ndarray


def prompt(config: DecoderConfig, B: int = 2, S: int = 12, seed: int = 1) -> Prompt:
    """A 2 x 2 picture from the third token on; on the axes no two positions go alike."""
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(S), (3, B, 1))
    image = np.zeros((B, S), bool)
    image[:, 2:6] = True
    positions[0, :, 2:6] = 2
    positions[1, :, 2:6] = [2, 2, 3, 3]
    positions[2, :, 2:6] = [2, 3, 2, 3]
    positions[:, :, 6:] -= 2
    positions[2, 1:] += 3
    return Prompt(
        rng.integers(0, config.vocab_size, (B, S)),
        positions,
        image,
        rng.standard_normal((int(image.sum()), config.embeds_size)).astype("f4"),
    )


@dataclass(frozen=True)
class Pair:
    """One model twice: in torch, and as graphs."""

    config: DecoderConfig
    torch: Any
    embed_session: ort.InferenceSession
    session: ort.InferenceSession

    def embeds(self, asked: Prompt) -> np.ndarray:
        embeds = np.asarray(self.embed_session.run(None, {"input_ids": asked.ids})[0]).copy()
        embeds[asked.image] = asked.features
        return embeds

    def run(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        past: dict[str, np.ndarray] | None = None,
        mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and the cache under the names under which it is fed."""
        B, S = embeds.shape[:2]
        shape = (B, self.config.kv_heads, 0, self.config.head_size)
        half_precision = "float16" in self.session.get_inputs()[-1].type
        dtype = np.float16 if half_precision else np.float32
        past = past or {
            f"past_key_values.{i}.{half}": np.zeros(shape, dtype)
            for i in range(self.config.num_hidden_layers)
            for half in ("key", "value")
        }
        length = next(iter(past.values())).shape[2]
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((B, length + S), np.int64) if mask is None else mask,
            "position_ids": positions,
            "num_logits_to_keep": np.array(0),
        }
        logits, *presents = map(np.asarray, self.session.run(None, feeds | past))
        return logits, dict(zip(past, presents, strict=True))

    def truth(self, asked: Prompt) -> np.ndarray:
        """Logits [B, S, V] by the classes of transformers, features and lanes given their way."""
        text, D = self.torch.model.language_model, self.config.hidden_size
        with torch.no_grad():
            embeds = text.embed_tokens(torch.from_numpy(asked.ids))
            features = torch.from_numpy(asked.features)
            image = torch.from_numpy(asked.image)
            embeds[image] = features[:, :D]
            lanes = list(features[:, D:].split(D, dim=1)) if self.config.deepstack_lanes else []
            deepstack = {"visual_pos_masks": image, "deepstack_visual_embeds": lanes}
            hidden = text(
                inputs_embeds=embeds,
                position_ids=torch.from_numpy(asked.positions),
                **(deepstack if lanes else {}),
            ).last_hidden_state
            return self.torch.lm_head(hidden).numpy()


def make(case: Case, form: Format = FLOAT32, **changes: Any) -> Pair:
    """`changes` are of the graph's config only."""
    model = case.model()
    config = dataclasses.replace(case.config, **changes)
    tensors = {
        name.replace("model.language_model.", "model."): weight.detach().numpy()
        for name, weight in model.state_dict().items()
        if ".visual." not in name
    }
    embedding = {name: tensors.pop(name) for name in ["model.embed_tokens.weight"]}
    if not config.qk_norm:
        tensors = {name: weight for name, weight in tensors.items() if "k_norm" not in name}
        tensors = {name: weight for name, weight in tensors.items() if "q_norm" not in name}
    return Pair(
        config,
        model,
        open_graph(embed_graph(config), embedding),
        open_graph(decoder_graph(config, form=form, head=form), tensors),
    )


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(np.abs(expected).max()))


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make(request.param)


def test_logits_equal_transformers(pair: Pair) -> None:
    asked = prompt(pair.config)
    assert_same(pair.run(pair.embeds(asked), asked.positions)[0], pair.truth(asked))


def test_chunks_and_steps_equal_one_pass(pair: Pair) -> None:
    """The first cut is within the picture."""
    asked = prompt(pair.config, B=1)
    truth, embeds, past, at = pair.truth(asked), pair.embeds(asked), None, 0
    for size in (4, 1, 4, 1, 1, 1):
        new = slice(at, at + size)
        logits, past = pair.run(embeds[:, new], asked.positions[:, :, new], past)
        assert_same(logits, truth[:, new])
        at += size
    assert at == embeds.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(pair: Pair, side: str) -> None:
    """Rows of unequal length, then a step that follows the padding."""
    lengths, S = [5, 9, 7], 9
    rows = [prompt(pair.config, B=1, S=n + 1, seed=n) for n in lengths]
    truths = [pair.truth(row)[0] for row in rows]
    embeds = np.zeros((3, S, pair.config.embeds_size), np.float32)
    mask, positions = np.zeros((3, S), np.int64), np.zeros((3, 3, S), np.int64)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        real = slice(S - n, S) if side == "left" else slice(0, n)
        embeds[b, real] = pair.embeds(row)[0, :n]
        mask[b, real], positions[:, b, real] = 1, row.positions[:, 0, :n]
    logits, past = pair.run(embeds, positions, mask=mask)
    for b, n in enumerate(lengths):
        assert_same(logits[b][mask[b] == 1], truths[b][:n])
    mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    last = np.stack([pair.embeds(row)[0, -1:] for row in rows])
    positions = np.stack([row.positions[:, 0, -1:] for row in rows], axis=1)
    logits, _ = pair.run(last, positions, past, mask)
    for b, n in enumerate(lengths):
        assert_same(logits[b, 0], truths[b][n])


def test_embeddings_have_empty_lanes() -> None:
    pair = make(CASES["qwen3"])
    ids = np.array([[3, 1, 60]])
    (embeds,) = map(np.asarray, pair.embed_session.run(None, {"input_ids": ids}))
    table = pair.torch.model.language_model.embed_tokens.weight.detach().numpy()
    assert embeds.shape == (1, 3, 3 * 48)
    np.testing.assert_array_equal(embeds[..., :48], table[ids])
    assert not embeds[..., 48:].any()


BREAKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sections in place of turns": ("qwen3", {"mrope_interleaved": False}),
    "turns in place of sections": ("qwen2.5", {"mrope_interleaved": True}),
    "other sections": ("qwen2.5", {"mrope_section": (3, 2, 3)}),
    "no norms": ("qwen3", {"qk_norm": False}),
    "a lane left out": ("qwen3", {"deepstack_lanes": 1}),
}


@pytest.mark.parametrize(("name", "changes"), BREAKS.values(), ids=BREAKS)
def test_the_comparison_can_fail(name: str, changes: dict[str, Any]) -> None:
    right, wrong = make(CASES[name]), make(CASES[name], **changes)
    asked = prompt(right.config)
    embeds = right.embeds(asked)[..., : wrong.config.embeds_size]
    with pytest.raises(AssertionError):
        assert_same(wrong.run(embeds, asked.positions)[0], right.truth(asked))


def test_a_lane_after_the_wrong_layer_is_seen() -> None:
    pair = make(CASES["qwen3"])
    asked = prompt(pair.config)
    embeds = pair.embeds(asked)
    D = pair.config.hidden_size
    swapped = np.concatenate([embeds[..., :D], embeds[..., 2 * D :], embeds[..., D : 2 * D]], -1)
    with pytest.raises(AssertionError):
        assert_same(pair.run(swapped, asked.positions)[0], pair.truth(asked))


@pytest.mark.parametrize(
    ("form", "limit"), [(FLOAT16, 0.01), (W8A8, 0.2), (INT4, 0.5)], ids=["fp16", "q8", "q4"]
)
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_other_forms_are_near(name: str, form: Format, limit: float) -> None:
    """Norms, biases and lanes have the floats of the form. Of the whole, not of each number: a
    tiny model of random weights leaves rounding nowhere to average out."""
    pair = make(CASES[name], form)
    asked = prompt(pair.config)
    truth = pair.truth(asked)
    got, _ = pair.run(pair.embeds(asked), asked.positions)
    assert np.sqrt(((got - truth) ** 2).mean()) < limit * truth.std()
    asked.features[:, pair.config.hidden_size // 2 :] *= -1
    other, _ = pair.run(pair.embeds(asked), asked.positions)
    assert np.sqrt(((other - truth) ** 2).mean()) > 2 * limit * truth.std()
