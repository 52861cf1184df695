"""verify compares with what was trained: the adapter's tokenizer, template and settings too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer

from tests.checkpoints import write_json
from tests.qwen_checkpoints import QWEN3_TEMPLATE, write_qwen3
from vlmport.errors import CheckpointWarning
from vlmport.exporter import export
from vlmport.families.qwen_vl.reference import QwenVLReference
from vlmport.parity import verify
from vlmport.parity.pictures import drawn_pictures

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def trained(base: Path) -> Path:
    """An adapter of the decoder; its folder."""
    kind: Any = transformers.AutoModelForImageTextToText
    peft = get_peft_model(kind.from_pretrained(base), LoraConfig(r=2, target_modules=["o_proj"]))
    folder = base.parent / "adapter"
    peft.save_pretrained(str(folder))
    return folder


def test_prompts_pixels_and_stops_are_those_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_qwen3(tmp_path / "base")
    adapter = trained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(base))
    tokenizer.chat_template = QWEN3_TEMPLATE.replace("assistant\n", "assistant<part>\n")
    tokenizer.save_pretrained(str(adapter))
    known = Tokenizer.from_file(str(adapter / "tokenizer.json"))
    known.add_special_tokens([AddedToken("<part>", special=True)])
    known.save(str(adapter / "tokenizer.json"))
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(str(base))
    images.image_mean = [0.25, 0.5, 0.75]
    images.save_pretrained(str(adapter))
    write_json(adapter / "generation_config.json", {"eos_token_id": 7})
    with pytest.warns(CheckpointWarning) as caught:
        bundle = export(base, tmp_path / "bundle", precisions="q8", adapter=adapter)
    assert {getattr(one.message, "code", None) for one in caught} == {"adapter.files-differ"}
    assert 7 in bundle.manifest.generation.stop_token_ids
    asked = QwenVLReference.requests
    monkeypatch.setattr(
        QwenVLReference, "requests", lambda self, _: asked(self, drawn_pictures()[:4])[:1]
    )
    report = verify(bundle, base, adapter=adapter)
    assert report.passed, [row for row in report.rows if not row.passed]
