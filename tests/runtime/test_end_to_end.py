"""From the picture to the tokens as transformers' own `generate` makes them, in fp32.

The built-in captioner and tiny random ones. Where tokens are drawn, torch.multinomial is replaced
by the random stream of docs/decoding.md, so that both sides draw the same numbers.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.checkpoints import write_prefix_checkpoint
from tests.runtime import toy
from vlmport.builtin import builtin_folder
from vlmport.exporter import export
from vlmport.parity.references import load_reference
from vlmport.runtime.decoding.rng import draw, draw_several, stream
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.model import VLM
from vlmport.runtime.response import Answer, Caption

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    ROOT / "examples" / name
    for name in ("red_square.png", "green_triangle_purple_circle.png", "yellow_circle.png")
]


@dataclass(frozen=True)
class Both:
    """A model on both sides, and pictures."""

    vlm: VLM
    reference: Any
    tokenizer: transformers.PreTrainedTokenizerFast
    pictures: list[np.ndarray]

    def theirs(self, rgb: np.ndarray, **options: Any) -> list[tuple[list[int], float | None]]:
        """What `generate` returns: the new tokens up to their end, and the beams' scores."""
        stops = list(self.vlm.components.manifest.generation.stop_token_ids)
        settings = transformers.GenerationConfig(
            **{"max_new_tokens": 12, **options},
            eos_token_id=stops,
            pad_token_id=stops[0],
            return_dict_in_generate=True,
            output_scores=True,
        )
        reference, image = self.reference, Image.fromarray(rgb)
        ids = reference.image_ids(image)
        embeds = reference.embeds(ids, reference.vision_features(reference.pixels(image)))
        with torch.no_grad(), warnings.catch_warnings():
            # It says that it looks at new tokens only, as this family's bundles do.
            warnings.filterwarnings("ignore", ".*inputs_embeds", UserWarning)
            output = reference.model.language_model.generate(
                inputs_embeds=torch.from_numpy(embeds)[None],
                attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
                generation_config=settings,
                tokenizer=self.tokenizer,
            )
        scores = getattr(output, "sequences_scores", None)
        texts = [_until_stop(row, stops) for row in output.sequences.tolist()]
        if scores is None:
            return [(text, None) for text in texts]
        return list(zip(texts, scores.tolist(), strict=True))


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """Without the padding after the first stop token."""
    return tokens[: next((i + 1 for i, one in enumerate(tokens) if one in stops), len(tokens))]


def both(checkpoint: Path, out: Path, pictures: list[np.ndarray]) -> Both:
    bundle = export(checkpoint, out, precisions=("fp32",))
    token = bundle.manifest.prompt.image_token_id
    vlm = VLM.open(bundle, precision="fp32", threads=1)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vlm.prompter.tokenizer)
    return Both(vlm, load_reference(checkpoint, image_token_id=token), tokenizer, pictures)


@pytest.fixture(scope="module", params=["shapes", "random"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """An untied head: with a tied one, a random model says one token for ever."""
    folder = tmp_path_factory.mktemp("decoding")
    if request.param == "shapes":
        pictures = [open_image(path) for path in EXAMPLES]
        checkpoint = builtin_folder("shapes")
        assert checkpoint is not None
        return both(checkpoint, folder / "bundle", pictures)
    checkpoint = write_prefix_checkpoint(folder / "checkpoint", text={"tie_word_embeddings": False})
    pictures = [toy.picture(one, 20 + one, 31) for one in range(3)]
    return both(checkpoint, folder / "bundle", pictures)


def answers(caption: Caption) -> list[Answer]:
    return [caption, *caption.alternatives]


def check(model: Both, rgb: np.ndarray, **options: Any) -> None:
    """The same sequences in the same order, with the same scores."""
    ours = answers(model.vlm.caption(rgb, **{"max_new_tokens": 12, **options}))
    theirs = model.theirs(rgb, **options)
    stops = set(model.vlm.components.manifest.generation.stop_token_ids)
    trimmed = [_until_stop(list(one.token_ids), list(stops)) for one in ours]
    # A finished beam is padded by transformers with the id at which ours end.
    for mine, (want, score), answer in zip(trimmed, theirs, ours, strict=True):
        assert mine == want or [*mine, *want[len(mine) :]] == want, options
        assert len(mine) == len(want) or answer.stop_reason == "stop_string"
        if score is not None:
            assert answer.score == pytest.approx(score, rel=1e-4, abs=1e-4)


GREEDY = [
    {},
    {"max_new_tokens": 1},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 10},
    {"suppress_tokens": [65, 66], "begin_suppress_tokens": [70]},
    {"bad_words_ids": [[65], [310, 291]] , "repetition_penalty": 0.8},
    {"forced_eos_token_id": 0, "max_new_tokens": 5},
    {"exponential_decay_length_penalty": (3, 1.3)},
    {"sequence_bias": [[[66], 4.0], [[67, 68], -3.0]], "renormalize_logits": True},
]  # fmt: skip


def known(model: Both, options: dict[str, Any]) -> dict[str, Any]:
    """The options with ids that this vocabulary has."""
    size = model.vlm.components.manifest.dims.vocab_size
    if "bad_words_ids" in options:
        words = [[one % size for one in word] for word in options["bad_words_ids"]]
        return options | {"bad_words_ids": words}
    return options


@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_greedy(model: Both, options: dict[str, Any]):
    check(model, model.pictures[0], **known(model, options))


BEAMS = [
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 5, "num_return_sequences": 2, "length_penalty": 2.0},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": -1.0, "early_stopping": True},
    {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never", "length_penalty": 0.7},
    {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "early_stopping": True},
    {"num_beams": 3, "min_new_tokens": 8, "num_return_sequences": 2},
    {"num_beams": 6, "max_new_tokens": 4, "num_return_sequences": 6},
    {"num_beams": 3, "max_new_tokens": 1, "num_return_sequences": 3},
]


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beams(model: Both, options: dict[str, Any]):
    for rgb in model.pictures[:2]:
        check(model, rgb, **options)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings(model: Both, beams: int):
    """Each pair of letters of the free text, so that they lie across tokens too."""
    rgb = model.pictures[0]
    text = model.vlm.caption(rgb, max_new_tokens=12, num_beams=beams).text.strip()
    strings = [text[at : at + 2] for at in (1, 5, 8)]
    for string in strings:
        if "\ufffd" not in string and string:
            check(model, rgb, stop_strings=[string, "zq"], num_beams=beams)


SAMPLING = [
    {},
    {"temperature": 0.7, "top_k": 0},
    {"top_p": 0.8, "top_k": 20},
    {"min_p": 0.1, "temperature": 1.5},
    {"typical_p": 0.6},
    {"epsilon_cutoff": 0.02, "top_k": 0},
    {"eta_cutoff": 0.03, "top_k": 0},
    {"top_k": 5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_sampling(
    model: Both, options: dict[str, Any], beams: int, monkeypatch: pytest.MonkeyPatch
):
    """The distributions are transformers'; only the numbers that choose are ours."""
    seed = 3
    state = stream(seed, 0)

    def multinomial(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        nonlocal state
        with np.errstate(divide="ignore"):
            scores = np.log(probs.numpy().astype(np.float32))
        assert len(scores) == 1
        if num_samples == 1:
            token, state = draw(scores[0], state)
            return torch.tensor([[token]])
        tokens, state = draw_several(scores[0], num_samples, state)
        return torch.tensor([tokens])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        asked = {**options, "do_sample": True, "num_beams": beams}
        want = model.theirs(model.pictures[0], **asked)
    caption = model.vlm.caption(model.pictures[0], max_new_tokens=12, seed=seed, **asked)
    assert list(caption.token_ids) == want[0][0]
    assert caption.seed == seed


def test_log_probabilities(model: Both):
    """Of the raw logits, whatever the processors do to them."""
    rgb = model.pictures[0]
    caption = model.vlm.caption(rgb, max_new_tokens=8, logprobs=3, repetition_penalty=1.5)
    reference = model.reference
    image = Image.fromarray(rgb)
    ids = reference.image_ids(image)
    features = reference.vision_features(reference.pixels(image))
    whole = np.concatenate([ids, np.array(caption.token_ids[:-1], np.int64)])
    logits = reference.logits(reference.embeds(whole, features), reference.position_ids(whole))
    want = torch.log_softmax(torch.from_numpy(logits[len(ids) - 1 :]), -1)
    assert caption.logprobs is not None
    for reported, token, row in zip(caption.logprobs, caption.token_ids, want, strict=True):
        assert reported.token == token
        assert reported.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, places = row.topk(3)
        assert [one for one, _ in reported.top] == places.tolist()
        np.testing.assert_allclose([value for _, value in reported.top], values, atol=1e-4)


def test_options_may_differ_within_a_batch(model: Both):
    """Each request has what it has alone: greedy, beams, samples and short ones together."""
    vlm, messages = model.vlm, model.vlm.components.manifest.prompt.caption
    every = [*GREEDY[1:4], *BEAMS[:5], {"do_sample": True, "seed": 4, "num_return_sequences": 3}]
    every += [{"stop_strings": ["a"]}, {"num_beams": 2, "do_sample": True, "seed": 1}]
    every = [{"max_new_tokens": 12, **options} for options in every]
    pictures = list(itertools.islice(itertools.cycle(model.pictures), len(every)))

    def prompt(rgb: np.ndarray, options: dict[str, Any]) -> Any:
        return vlm.preparer.prepare(messages, [rgb], vlm.preparer.decoding(options))

    together = vlm._run([prompt(rgb, one) for rgb, one in zip(pictures, every, strict=True)])
    for rgb, options, caption in zip(pictures, every, together, strict=True):
        alone = vlm._run([prompt(rgb, options)])[0]
        assert [one.token_ids for one in answers(caption)] == [
            one.token_ids for one in answers(alone)
        ]
        assert [one.text for one in answers(caption)] == [one.text for one in answers(alone)]
        for one, other in zip(answers(caption), answers(alone), strict=True):
            assert (one.score is None) == (other.score is None)
            assert one.score is None or one.score == pytest.approx(other.score, abs=1e-4)


def test_a_difference_would_be_seen(model: Both):
    """The comparisons above can fail: other beams, another penalty."""
    rgb = model.pictures[0]
    theirs = model.theirs(rgb, num_beams=3, length_penalty=2.0)[0]
    ours = model.vlm.caption(rgb, max_new_tokens=12, num_beams=3, length_penalty=0.5)
    assert ours.score != pytest.approx(theirs[1], rel=1e-3)
    greedy = model.theirs(rgb)[0][0]
    suppressed = model.vlm.caption(rgb, max_new_tokens=12, suppress_tokens=greedy[2])
    assert list(suppressed.token_ids) != greedy
