"""The recipe's fast forward passes are transformers' own; its checkpoints are the Hub's format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from tests.training.qwen_shapes import Untrained, write_untrained
from training.fitting import IGNORE, Stage
from training.shapes.batches import CELLS, patch_geometry
from training.shapes.scenes import Scene, Thing
from training.shapes_qwen import evaluate, train
from training.shapes_qwen.batches import Batch, Conversations
from training.shapes_qwen.checkpoint import read_checkpoint
from training.shapes_qwen.dense import BESIDE_PICTURE, EDGE_UNIT, DenseHeads, edges_of, shares_of
from training.shapes_qwen.families import FAMILIES, QWEN3
from training.shapes_qwen.language import fit_lengths, load_language
from training.shapes_qwen.model import VISION, Chat
from training.shapes_qwen.pictures import PATCH, SHIPPED, Grid, in_merge_order, patches
from training.shapes_qwen.prompts import IMAGE

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=list(FAMILIES))
def untrained(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Untrained:
    return write_untrained(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


def batch_of(untrained: Untrained, pictures: int) -> Batch:
    data = Conversations(
        "x", 9, 2, untrained.tokenizer, untrained.family, turns=2, drawn=True, canvases=SHIPPED
    )
    return next(batch for batch in map(data.__getitem__, range(9)) if len(batch.shown) == pictures)


def _square(side: float) -> Thing:
    """In the middle of a canvas of 240 x 200."""
    return Thing("square", "red", "medium", (230, 30, 35), 120.0, 100.0, side)


@torch.no_grad()
def test_the_tower_sees_what_transformers_sees(untrained: Untrained) -> None:
    (shown,) = batch_of(untrained, 1).shown
    plain = read_checkpoint(untrained.folder)[1].model.visual
    grids = torch.tensor([[1, *shown.grid]] * 2)
    expected = plain(patches(shown.pixels, untrained.family).flatten(0, 1), grid_thw=grids)
    seen = untrained.chat.see(shown.pixels)
    torch.testing.assert_close(seen.tokens.flatten(0, 1), expected.pooler_output, **CLOSE)
    assert len(seen.lanes) == untrained.family.lanes
    for lane, other in zip(seen.lanes, getattr(expected, "deepstack_features", ()), strict=True):
        torch.testing.assert_close(lane.flatten(0, 1), other, **CLOSE)
    # What the dense questions are asked of is what the merger is given, in merge order.
    merger = untrained.chat.tower.merger
    rest = merger.mlp if untrained.family != QWEN3 else _after_norm(merger)
    again = rest(seen.patches.view(-1, 4 * seen.patches.shape[-1]))
    torch.testing.assert_close(again, expected.pooler_output, **CLOSE)


def _after_norm(merger: Any) -> Any:
    return lambda patches: merger.linear_fc2(merger.act_fn(merger.linear_fc1(patches)))


@torch.no_grad()
def test_windows_and_pictures_are_kept_apart(untrained: Untrained) -> None:
    """The same comparison fails where a block looks further than it may."""
    (shown,) = batch_of(untrained, 1).shown
    tokens = untrained.chat.see(shown.pixels).tokens
    alone = untrained.chat.see(shown.pixels[:1]).tokens
    torch.testing.assert_close(tokens[:1], alone, **CLOSE)
    attentions = [block.attn for block in untrained.chat.tower.blocks]
    windowed = [attention for attention in attentions if attention.windowed]
    assert len(windowed) == (0 if untrained.family == QWEN3 else 4)
    for attention in windowed[:1]:
        attention.windowed = False
        without = untrained.chat.see(shown.pixels).tokens
        attention.windowed = True
        assert (without - tokens).abs().max() > 1e-2


@pytest.mark.parametrize("pictures", [1, 2])
@torch.no_grad()
def test_the_loss_is_transformers(untrained: Untrained, pictures: int) -> None:
    batch = batch_of(untrained, pictures)
    chat = untrained.chat
    seen = [chat.see(shown.pixels) for shown in batch.shown]
    features = torch.cat([one.tokens for one in seen], dim=1)
    lanes = [torch.cat(lane, dim=1) for lane in zip(*(one.lanes for one in seen), strict=True)]
    ours = chat.loss(batch, features, lanes)
    plain = read_checkpoint(untrained.folder)[1]
    cut = [patches(shown.pixels, untrained.family) for shown in batch.shown]
    rows = range(len(batch.ids))
    logits = plain(
        input_ids=batch.ids,
        mm_token_type_ids=(batch.ids == untrained.tokenizer.token_to_id(IMAGE)).int(),
        pixel_values=torch.cat([one[row] for row in rows for one in cut]),
        image_grid_thw=torch.tensor([[1, *one.grid] for _ in rows for one in batch.shown]),
    ).logits
    theirs = cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)
    wrong = chat.loss(batch, features.flip(1), lanes)
    assert (wrong - theirs).abs() > 1e-3
    if lanes:
        wrong = chat.loss(batch, features, lanes[::-1])
        assert (wrong - theirs).abs() > 1e-3


def test_the_checkpoint_reads_back_equal(untrained: Untrained) -> None:
    family, model, tokenizer = read_checkpoint(untrained.folder)
    assert family == untrained.family
    assert tokenizer.to_str() == untrained.tokenizer.to_str()
    ours, theirs = untrained.chat.vlm.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_reference_reads_the_same_model(untrained: Untrained) -> None:
    """`vlmport verify` reads the folder without transformers' renaming."""
    ours = untrained.chat.vlm.state_dict()
    theirs = untrained.reference().model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_folder_is_as_on_the_hub(untrained: Untrained) -> None:
    files = {path.name: path for path in untrained.folder.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) < 4_000_000
    config = json.loads(files["config.json"].read_text())
    names = set(load_file(files["model.safetensors"]))
    pixels = json.loads(files["preprocessor_config.json"].read_text())
    assert "lm_head.weight" in names
    assert config["tie_word_embeddings"] is False
    if untrained.family == QWEN3:
        assert config["model_type"] == "qwen3_vl"
        assert "model.visual.deepstack_merger_list.1.linear_fc2.weight" in names
        assert "model.language_model.layers.3.self_attn.q_norm.weight" in names
        assert pixels["size"] == {"longest_edge": 42 * 576, "shortest_edge": 30 * 576}
    else:
        assert config["model_type"] == "qwen2_5_vl"
        assert "text_config" not in config
        assert "visual.blocks.5.mlp.gate_proj.bias" in names
        assert "model.layers.3.self_attn.q_proj.bias" in names
        assert (pixels["min_pixels"], pixels["max_pixels"]) == (30 * 576, 42 * 576)
    rows = (config.get("text_config") or config)["vocab_size"]
    assert rows > untrained.tokenizer.get_vocab_size()


def test_special_tokens_follow_the_words(untrained: Untrained) -> None:
    settings = json.loads((untrained.folder / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    names = [added[number]["content"] for number in sorted(added, key=int)]
    assert [*map(int, sorted(added, key=int))] == [*range(440, 456)]
    assert names[0] == "<|endoftext|>"
    assert names[12] == IMAGE
    assert [added[number]["special"] for number in added] == [True] * 14 + [False] * 2
    for word in ("red", "white", "gray", "pink", "circle", "star", "below", "large"):
        assert len(untrained.tokenizer.encode(f" {word}").ids) == 1  # a note says one token


@torch.no_grad()
def test_a_switch_changes_what_it_says_and_is_put_back(untrained: Untrained) -> None:
    family, model, tokenizer = read_checkpoint(untrained.folder)
    tasks = evaluate.held_out_tasks(2)
    prompts = [evaluate._prompt(family, tokenizer, task) for task in tasks]
    inputs = evaluate._inputs(family, tokenizer, tasks, prompts)
    before = model(**inputs).logits
    switches = evaluate.switches(family)
    assert list(switches) == ["M-RoPE", "DeepStack"][: 1 + (family == QWEN3)]
    for switch in switches.values():
        with switch(model):
            off = model(**inputs).logits
        assert (off - before)[:, -1].abs().max() > 1e-3
        assert torch.equal(model(**inputs).logits, before)


def test_vlmport_answers_as_transformers_does(
    untrained: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, batch or not: captions, questions, and one of them about two pictures."""
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path))
    family, model, tokenizer = read_checkpoint(untrained.folder)
    tasks = evaluate.held_out_tasks(4)
    assert max(len(task.scenes) for task in tasks) == 2
    given = evaluate.answers_by_torch(family, model, tokenizer, tasks)
    assert evaluate.answers_by_vlmport(untrained.folder, tasks) == given
    assert len(set(given)) > 4


def test_plain_positions_count_on(untrained: Untrained) -> None:
    model = read_checkpoint(untrained.folder)[1]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with evaluate.without_mrope(model):
        plain, delta = model.model.get_rope_index(torch.zeros_like(mask), attention_mask=mask)
    assert plain.tolist() == [[[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]] * 3
    assert delta.tolist() == [[0], [0]]


def test_an_untrained_model_does_not_pass(
    untrained: Untrained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", str(untrained.folder), "--tasks", "2"])
    assert evaluate.main() == 1
    assert "exact match: captions 0.0 %, questions 0.0 %, 2 of each" in capsys.readouterr().out


@torch.no_grad()
def test_the_language_model_begins_as_smolvlms(untrained: Untrained) -> None:
    """Layers as they are, words by what they say, queries as long as they were."""
    chat = Chat(untrained.family, untrained.chat.vlm.config).eval()
    load_language(chat, untrained.tokenizer, train.SMOLVLM)
    stored = load_file(train.SMOLVLM / "model.safetensors")
    known = Tokenizer.from_file(str(train.SMOLVLM / "tokenizer.json"))
    for name in ("layers.3.self_attn.v_proj.weight", "norm.weight"):
        theirs = stored[f"model.text_model.{name}"].float()
        assert torch.equal(chat.text.state_dict()[name], theirs)
    pairs = {"Ġcircle": "Ġcircle", "red": "Ġred", "<|im_end|>": "<end_of_utterance>"}
    for ours, other in pairs.items():
        row, source = untrained.tokenizer.token_to_id(ours), known.token_to_id(other)
        assert torch.equal(
            chat.text.embed_tokens.weight[row],
            stored["model.text_model.embed_tokens.weight"][source].float(),
        )
        assert torch.equal(chat.vlm.lm_head.weight[row], stored["lm_head.weight"][source].float())
    lengths: list[tuple[float, float]] = []
    ids = torch.arange(40)[None]
    fit_lengths(chat, lambda: chat.text(input_ids=ids))
    for layer in chat.text.layers:
        norm = getattr(layer.self_attn, "q_norm", None)
        if norm is not None:
            norm.register_forward_hook(
                lambda _, x, y: lengths.append((x[0].norm().item(), y.norm().item()))
            )
    chat.text(input_ids=ids)
    assert len(lengths) == (4 if untrained.family == QWEN3 else 0)
    for before, after in lengths:
        assert after == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_two_steps_of_each_stage(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run goes through all stages, and a second one takes up their results."""
    for name in ("TOWER", "AGAIN", "NOTES", "JOIN", "CHAT", "CAPTIONS", "SCALE", "FINISH"):
        monkeypatch.setattr(train, name, Stage(steps=2, batch_size=2, rate=1e-3, tower_rate=1e-4))
    out = tmp_path / "model"
    train.train(out, FAMILIES[family], seed=0, scale=1.0, language=train.SMOLVLM)
    names = [path.name.split("-")[0] for path in (tmp_path / "model-stages").iterdir()]
    assert sorted(names) == [
        "again",
        "captions",
        "chat",
        "finish",
        "join",
        "notes",
        "scale",
        "tower",
    ]
    first = load_file(out / "model.safetensors")
    capsys.readouterr()
    train.train(out, FAMILIES[family], seed=0, scale=1.0, language=train.SMOLVLM)
    assert "minutes" not in capsys.readouterr().out  # nothing was trained again
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(value.isfinite().all() for value in first.values())


def test_patches_are_told_where_they_and_how_large_their_things_are() -> None:
    grid = Grid(10, 12)
    left, top, right, bottom = (EDGE_UNIT * edges_of(grid)).unbind(dim=-1)
    assert ((left + right) == 12).all()
    assert ((top + bottom) == 10).all()
    # In merge order: right of the first patch comes the second, below it the third.
    assert (left[:3].tolist(), top[:3].tolist()) == ([0.5, 1.5, 0.5], [0.5, 0.5, 1.5])
    scene = Scene(240, 200, "white", (255, 255, 255), (_square(side=60.0),))
    lengths = in_merge_order(patch_geometry(scene, grid.size, PATCH), grid)[None, :, CELLS:]
    shares = shares_of(torch.from_numpy(lengths), grid) / BESIDE_PICTURE
    known = shares[~shares.isnan()]
    assert len(known) == 16  # three patches a side, half of the outer ones
    torch.testing.assert_close(known, torch.full_like(known, 60 / 200))


def test_heads_that_learn_alone_leave_the_tower(untrained: Untrained) -> None:
    (shown,) = batch_of(untrained, 1).shown
    heads = DenseHeads(1.0, beside_picture=True, alone=1)
    given = torch.zeros(*shown.answers.shape[:2], VISION, requires_grad=True)
    heads(given, shown).backward()
    assert given.grad is None
    heads(given, shown).backward()
    assert given.grad is not None
    assert given.grad.abs().sum() > 0
