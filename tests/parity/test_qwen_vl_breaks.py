"""What goes wrong with Qwen-VL in the field, each on purpose: the rung that must see it first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.breaks import positions_of_steps_that_restart, shifted_positions
from tests.parity.conftest import Case, assert_first_broken
from tests.parity.qwen import WRITERS, Family
from tests.parity.surgery import copied, renewed
from vlmport.bundle import Bundle
from vlmport.exporter import export
from vlmport.families.qwen_vl import smart_resize, tower_2_5, tower_3
from vlmport.families.qwen_vl.patchify import Patching
from vlmport.families.qwen_vl.qwen3 import Qwen3VL
from vlmport.graph import decoder, mrope
from vlmport.parity.pictures import drawn_pictures
from vlmport.runtime.prompt import Prompter

Patch = pytest.MonkeyPatch

BOTH, OLD, NEW = ("qwen2_5", "qwen3"), ("qwen2_5",), ("qwen3",)


# Pixels


def raster_order(patch: Patch) -> None:
    """Patches row by row of the picture, not block by block."""

    def cut(self: Patching, op: Any, image: Any) -> Any:
        p = self.size
        rows, columns = op.Split(
            op.Div(op.Shape(image, end=2), p), axis=0, num_outputs=2, _outputs=2
        )
        grid = op.Reshape(image, op.Concat(rows, [p], columns, [p, 3], axis=0))
        return op.Reshape(op.Transpose(grid, perm=[0, 2, 4, 1, 3]), [-1, 3, p, p])

    patch.setattr(Patching, "cut", cut)


# Towers


def rows_turn_with_columns(patch: Patch) -> None:
    for module in (tower_2_5, tower_3):
        plain = module.rotary_angles

        def swapped(op: Any, patches: Any, *args: Any, plain: Any = plain) -> Any:
            other = dataclasses.replace(patches, row=patches.column, column=patches.row)
            return plain(op, other, *args)

        patch.setattr(module, "rotary_angles", swapped)


def no_windows(patch: Patch) -> None:
    """Every block sees the whole picture."""
    patch.setattr(tower_2_5.WindowAttention, "over", lambda *args: None)
    plain = tower_2_5.Block.forward
    whole: dict[str, Any] = {}
    over = tower_2_5.FrameAttention.over

    def kept(*args: Any) -> Any:
        whole["among"] = over(*args)
        return whole["among"]

    patch.setattr(tower_2_5.FrameAttention, "over", kept)
    patch.setattr(
        tower_2_5.Block,
        "forward",
        lambda self, op, x, angles, among: plain(self, op, x, angles, whole["among"]),
    )


def partial_windows_see_what_fills_them(patch: Patch) -> None:
    patch.setattr(tower_2_5, "MASKED", 0.0)


def windows_everywhere(patch: Patch) -> None:
    config = tower_2_5.Qwen2_5VisionConfig
    plain = config.read
    patch.setattr(
        config,
        "read",
        lambda *args: dataclasses.replace(plain(*args), fullatt_block_indexes=()),
    )


def positions_not_interpolated(patch: Patch) -> None:
    """The learnt position above and to the left of each patch."""
    plain = tower_3.PositionTable._taps

    def nearest(self: Any, op: Any, *args: Any) -> Any:
        (first, weight), (second, rest) = plain(self, op, *args)
        return (first, op.Add(weight, rest)), (second, op.Sub(rest, rest))

    patch.setattr(tower_3.PositionTable, "_taps", nearest)


def no_deepstack(patch: Patch) -> None:
    """Zeros in the lanes, as exporters that drop it would have."""
    plain = tower_3.Merger.forward

    def forward(self: Any, op: Any, x: Any) -> Any:
        made = plain(self, op, x)
        return op.Mul(made, 0.0) if self.norm_after else made

    patch.setattr(tower_3.Merger, "forward", forward)


def lanes_of_the_tower_swapped(patch: Patch) -> None:
    plain = Qwen3VL.vision_tower

    def swapped(self: Any, form: Any) -> Any:
        layers = self.vision.deepstack_visual_indexes[::-1]
        vision = dataclasses.replace(self.vision, deepstack_visual_indexes=layers)
        return plain(dataclasses.replace(self, vision=vision), form)

    patch.setattr(Qwen3VL, "vision_tower", swapped)


# Embeddings, positions, decoder


def text_in_the_lanes(patch: Patch) -> None:
    patch.setattr(
        decoder,
        "with_lanes",
        lambda op, embeds, config: op.Tile(embeds, [1, 1, 1 + config.deepstack_lanes]),
    )


def changed_positions(patch: Patch, change: Callable[[Any, Any, Any, Any], Any]) -> None:
    plain = mrope.mrope_positions

    def changed(op: Any, ids: Any, mask: Any, *args: Any) -> Any:
        return change(op, mask, *plain(op, ids, mask, *args))

    patch.setattr(mrope, "mrope_positions", changed)


def positions_of_one_dimension(patch: Patch) -> None:
    def count(op: Any, mask: Any, positions: Any, delta: Any) -> Any:
        counted = op.Sub(op.CumSum(mask, op.Constant(value_int=1)), 1)
        counted = op.Expand(op.Unsqueeze(counted, [0]), op.Shape(positions))
        return counted, op.Mul(delta, 0)

    changed_positions(patch, count)


def height_and_width_swapped(patch: Patch) -> None:
    changed_positions(
        patch, lambda op, mask, positions, delta: (op.Gather(positions, [0, 2, 1], axis=0), delta)
    )


def an_offset_too_large(patch: Patch) -> None:
    changed_positions(patch, lambda op, mask, positions, delta: (positions, op.Add(delta, 1)))


def the_other_share_of_frequencies(patch: Patch) -> None:
    """Sections where they take turns, and the other way round."""
    plain = decoder.mrope_angles

    def other(*args: Any, interleaved: bool) -> Any:
        return plain(*args, interleaved=not interleaved)

    patch.setattr(decoder, "mrope_angles", other)


def changed_lanes(patch: Patch, change: Callable[[list[Any]], list[Any]]) -> None:
    plain = decoder.DecoderLayers._lanes

    def changed(self: Any, op: Any, x: Any) -> Any:
        x, lanes = plain(self, op, x)
        return x, change(lanes)

    patch.setattr(decoder.DecoderLayers, "_lanes", changed)


def lanes_that_are_not_added(patch: Patch) -> None:
    changed_lanes(patch, lambda lanes: [None] * len(lanes))


def lanes_of_the_decoder_swapped(patch: Patch) -> None:
    changed_lanes(patch, lambda lanes: [lanes[1], lanes[0], *lanes[2:]])


def lanes_a_layer_late(patch: Patch) -> None:
    changed_lanes(patch, lambda lanes: [None, *lanes[:-1]])


def queries_with_the_norm_of_keys(patch: Patch) -> None:
    plain = decoder.Attention._normalised

    def swapped(self: Any, op: Any, x: Any) -> Any:
        self.q_norm, self.k_norm = self.k_norm, self.q_norm
        try:
            return plain(self, op, x)
        finally:
            self.q_norm, self.k_norm = self.k_norm, self.q_norm

    patch.setattr(decoder.Attention, "_normalised", swapped)


EXPORTERS: list[tuple[str, Callable[[Patch], None], tuple[str, ...]]] = [
    ("pixels", raster_order, BOTH),
    ("vision_features", rows_turn_with_columns, BOTH),
    ("vision_features", no_windows, OLD),
    ("vision_features", windows_everywhere, OLD),
    ("vision_features", partial_windows_see_what_fills_them, OLD),
    ("vision_features", positions_not_interpolated, NEW),
    ("vision_features", no_deepstack, NEW),
    ("vision_features", lanes_of_the_tower_swapped, NEW),
    ("merged_embeds", text_in_the_lanes, NEW),
    ("position_ids", positions_of_one_dimension, BOTH),
    ("position_ids", height_and_width_swapped, BOTH),
    ("position_ids", an_offset_too_large, BOTH),
    ("first_logits", the_other_share_of_frequencies, BOTH),
    ("first_logits", lanes_that_are_not_added, NEW),
    ("first_logits", lanes_of_the_decoder_swapped, NEW),
    ("first_logits", lanes_a_layer_late, NEW),
    ("first_logits", queries_with_the_norm_of_keys, NEW),
]
PAIRS = [(name, rung, damage) for rung, damage, names in EXPORTERS for name in names]


@pytest.mark.parametrize(("name", "rung", "damage"), PAIRS, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_exporter(
    qwen_cases: dict[str, Case],
    tmp_path: Path,
    monkeypatch: Patch,
    name: str,
    rung: str,
    damage: Callable[[Patch], None],
) -> None:
    case = qwen_cases[name]
    damage(monkeypatch)
    bundle = export(case.checkpoint, tmp_path / "bundle", precisions="fp32")
    assert_first_broken(case.climb(bundle), rung)


@pytest.mark.parametrize("name", WRITERS)
def test_halves_rounded_up(
    qwens: dict[str, Family], tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    """As JavaScript's Math.round does: 12.5 and 6.5 blocks are 12 and 6."""
    family = qwens[name]
    halves = family.reference.requests(drawn_pictures())[3].name
    case = family.case(halves)
    assert len(case.truth.pictures[0].ids) == 72

    def half_up(op: Any, side: Any, factor: int) -> Any:
        return op.Div(op.Add(op.Mul(side, 2), factor), 2 * factor)

    monkeypatch.setattr(smart_resize, "_round_half_even", half_up)
    bundle = export(case.checkpoint, tmp_path / "bundle", precisions="fp32")
    assert_first_broken(case.climb(bundle), "prompt_ids")


MISREAD: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2_5", "pixels", {"pixels": {"image_mean": [0.5, 0.5, 0.5]}}),
    ("qwen2_5", "prompt_ids", {"pixels": {"max_pixels": 30 * 14 * 14}}),
    ("qwen2_5", "first_logits", {"text": {"rms_norm_eps": 1e-4}}),
    ("qwen2_5", "first_logits", {"text": {"rope_theta": 1e4 + 100}}),
    ("qwen3", "vision_features", {"vision": {"hidden_act": "gelu"}}),
    ("qwen3", "vision_features", {"vision": {"rope_parameters": {"rope_theta": 1e4 + 500}}}),
    ("qwen3", "first_logits", {"text": {"rope_scaling": {"mrope_section": [4, 3, 1]}}}),
    ("qwen3", "first_logits", {"config": {"tie_word_embeddings": True}}),
]


@pytest.mark.parametrize(("name", "rung", "misread"), MISREAD, ids=str)
def test_a_misread_config(
    qwen_cases: dict[str, Case], tmp_path: Path, name: str, rung: str, misread: dict[str, Any]
) -> None:
    """A request whose options are its own does not see other limits."""
    other = WRITERS[name](tmp_path / "checkpoint", **misread)
    bundle = export(other, tmp_path / "bundle", precisions="fp32")
    case = qwen_cases[name]
    if rung == "prompt_ids":
        case = dataclasses.replace(case, request=dataclasses.replace(case.request, options={}))
    assert_first_broken(case.climb(bundle), rung)


# A bundle, and a runtime


@pytest.fixture
def old(qwen_cases: dict[str, Case], tmp_path: Path) -> Bundle:
    """A copy of Qwen2.5's bundle, to be broken."""
    return copied(qwen_cases["qwen2_5"].bundle, tmp_path / "broken")


def test_no_default_system_message(qwen_cases: dict[str, Case], old: Bundle) -> None:
    said = "You are a helpful assistant."
    changed = 0
    for path in (*old.folder.glob("*.json"), *old.folder.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        if said in text:
            path.write_text(text.replace(said, "You are helpful."), encoding="utf-8")
            changed += 1
    assert changed
    report = qwen_cases["qwen2_5"].climb(renewed(old))
    assert_first_broken(report, "end_to_end")
    assert "ids differ" in report.summary


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("rung", "damage"),
    [("position_ids", shifted_positions), ("cached_decode", positions_of_steps_that_restart)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_wrong_runtime(
    qwen_cases: dict[str, Case],
    monkeypatch: Patch,
    name: str,
    rung: str,
    damage: Callable[[Patch, int], None],
) -> None:
    case = qwen_cases[name]
    damage(monkeypatch, len(case.truth.prompt_ids))
    assert_first_broken(case.climb(case.bundle), rung)


@pytest.mark.parametrize("name", WRITERS)
def test_pictures_in_another_order(
    qwen_cases: dict[str, Case], monkeypatch: Patch, name: str
) -> None:
    plain = Prompter.splice
    monkeypatch.setattr(
        Prompter, "splice", lambda self, ids, images: plain(self, ids, images[::-1])
    )
    assert_first_broken(qwen_cases[name].climb(qwen_cases[name].bundle), "end_to_end")
