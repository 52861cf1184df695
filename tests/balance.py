"""Which worker of pytest-xdist runs what, and in which order, so that all are busy to the end.

The tests of a file share its fixtures and stay together. A file that takes minutes and makes what
it needs once for all workers (tests/sharing.py) may be spread. Long ones begin first: pytest-xdist
itself begins with the files of many tests, which are the quick ones.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Their tests go one by one to whichever worker is free.
SPREAD = ("tests/web/test_web.py",)
# Files that take 5 seconds of a core and more, longest first. `make test-fast` leaves them out.
LONG = (
    "tests/web/test_web.py",
    "tests/serve/test_clients.py",
    "tests/parity/test_idefics3.py",
    "tests/training/test_shapes_qwen_trained.py",
    "tests/test_shapes_qwen.py",
    "tests/test_shapes_smolvlm.py",
    "tests/evaluation/test_evaluate.py",
    "tests/qwen_layouts/test_trained.py",
    "tests/exporter/test_soundness_of_towers.py",
    "tests/transformers_js/test_shapes_qwen.py",
    "tests/transformers_js/test_qwen.py",
    "tests/transformers_js/test_transformers_js.py",
    "tests/runtime/scheduling/test_arrivals.py",
    "tests/parity/test_qwen_vl.py",
    "tests/parity/test_qwen_vl_breaks.py",
    "tests/serve/test_command.py",
    "tests/serve/test_openapi.py",
    "tests/serve/test_limits.py",
    "tests/serve/test_chat.py",
    "tests/serve/test_tools.py",
    "tests/serve/test_responses.py",
    "tests/serve/test_errors.py",
    "tests/serve/test_caption.py",
    "tests/runtime/scheduling/test_prefixes.py",
    "tests/runtime/scheduling/test_load.py",
    "tests/checkpoint/test_source.py",
    "tests/runtime/test_engines.py",
    "tests/runtime/test_tuning.py",
    "tests/test_loading.py",
    "tests/exporter/test_packing.py",
    "tests/exporter/test_memory.py",
    "tests/transformers_js/test_conversations.py",
    "tests/web/test_decoding.py",
    "tests/training/test_shapes_qwen_model.py",
    "tests/transformers_js/test_card.py",
    "tests/exporter/test_soundness.py",
    "tests/bundle/test_hub_bundle.py",
    "tests/test_components_loop.py",
    "tests/families/idefics3/test_family.py",
    "tests/families/idefics3/test_tiling.py",
    "tests/parity/test_shapes_qwen.py",
    "tests/families/qwen_vl/test_prompts.py",
    "tests/test_bad_surroundings.py",
    "tests/parity/test_as_transformers_loads.py",
    "tests/exporter/test_weights_fit.py",
    "tests/parity/test_rounding.py",
    "tests/qwen_layouts/test_genai.py",
    "tests/parity/test_shapes_smolvlm.py",
    "tests/test_cli_decoding.py",
    "tests/families/idefics3/test_refusals.py",
    "tests/test_privacy.py",
    "tests/exporter/test_card.py",
    "tests/parity/test_refusals.py",
    "tests/parity/test_verify.py",
    "tests/test_cli_chat.py",
    "tests/families/qwen_vl/test_qwen3.py",
    "tests/families/idefics3/test_generate.py",
    "tests/graph/test_pillow_resize.py",
    "tests/qwen_layouts/test_trained_genai.py",
)


class ByFile(LoadFileScheduling):
    """A file is a unit of work, but for those that are spread."""

    def _split_scope(self, nodeid: str) -> str:
        scope = super()._split_scope(nodeid)
        return nodeid if scope in SPREAD else scope


def scheduler(config: pytest.Config, log: Producer) -> ByFile | None:
    """For `--dist loadfile`; None leaves other ways of distribution as they are."""
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


def long_first(items: list[pytest.Item]) -> None:
    """Put the files of LONG in front, in their order; the others stay as they are."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def mark_long(items: list[pytest.Item]) -> None:
    """The tests of LONG are slow ones, without a mark on each."""
    for item in items:
        if item.nodeid.partition("::")[0] in LONG:
            item.add_marker("slow")
