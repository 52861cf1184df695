"""Of several chat templates the export takes the one that transformers' processor renders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.checkpoints import write_json
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from vlmport.checkpoint import Checkpoint
from vlmport.errors import TokenizerError
from vlmport.families.templates import read_chat_template
from vlmport.parity.asked import Request
from vlmport.parity.references import load_reference
from vlmport.parity.references.pretrained import load_processor, render

# Each template writes its own name; None is no such file or key.
PROCESSOR = (None, "processor")
LEGACY = (None, {"chat_template": "legacy"}, {"chat_template": None}, {})
JINJA = (None, "jinja", "")
NAMED = ((), ("other",), ("default", "other"))
TOKENIZER = (
    None,
    "tokenizer",
    [{"name": "default", "template": "default of several"}, {"name": "rag", "template": "rag"}],
    [{"name": "rag", "template": "rag"}],
)
# What the tokenizer says counts only where the processor says nothing.
CASES = [
    *itertools.product(PROCESSOR, LEGACY, JINJA[:2], NAMED, TOKENIZER[1:2]),
    *itertools.product(PROCESSOR[:1], LEGACY[:1], JINJA, NAMED[:2], TOKENIZER),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_idefics3_checkpoint(tmp_path_factory.mktemp("templates") / "plain")
    for name in ("tokenizer_config.json", "processor_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("chat_template", None)
        write_json(folder / name, settings)
    return folder


def with_key(folder: Path, name: str, template: Any) -> None:
    settings = json.loads((folder / name).read_text())
    settings.pop("chat_template", None)
    write_json(folder / name, settings | ({} if template is None else {"chat_template": template}))


def arrange(folder: Path, case: tuple[Any, ...]) -> None:
    """Give the folder these templates and no others."""
    own, legacy, jinja, named, tokenizer = case
    with_key(folder, "processor_config.json", own)
    with_key(folder, "tokenizer_config.json", tokenizer)
    files: dict[str, str | None] = {
        "chat_template.json": None if legacy is None else json.dumps(legacy),
        "chat_template.jinja": jinja,
    }
    for name in ("default", "other"):
        text = f"named {name}" if name in named else None
        files[f"additional_chat_templates/{name}.jinja"] = text
    for name, text in files.items():
        path = folder / name
        path.unlink(missing_ok=True)
        if text is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def written(folder: Path) -> str | None:
    """What transformers renders; None where it refuses."""
    try:
        processor = load_processor(folder, transformers.Idefics3Processor)
        return render(processor, [{"role": "user", "content": "Hi"}])
    except (ValueError, KeyError):
        return None


def exported(folder: Path) -> str | None:
    try:
        return read_chat_template(Checkpoint.open(folder))
    except TokenizerError:
        return None


def test_every_combination_is_read_as_transformers_reads_it(plain: Path) -> None:
    found = set()
    for case in CASES:
        arrange(plain, case)
        theirs = written(plain)
        assert exported(plain) == theirs, case
        found.add(theirs)
    names = {"processor", "legacy", "jinja", "", "named default", "tokenizer", "default of several"}
    assert found == {None, *names}


def test_the_reference_asks_by_the_legacy_file_too(tmp_path: Path) -> None:
    """Not by the newer one beside it."""
    folder = write_idefics3_checkpoint(tmp_path / "checkpoint")
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    legacy = template.replace("Assistant:", "Bot:")
    write_json(folder / "chat_template.json", {"chat_template": legacy})
    (folder / "chat_template.jinja").write_text(template)
    token = json.loads((folder / "config.json").read_text())["image_token_id"]
    reference: Any = load_reference(folder, image_token_id=token)
    asked = Request("text", (), ({"role": "user", "content": [{"type": "text", "text": "Hi"}]},))
    ids = reference.prompt_ids(asked)
    assert reference.processor.decode(ids).endswith("Bot:")
    assert read_chat_template(Checkpoint.open(folder)) == legacy
