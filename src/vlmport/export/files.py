"""The files of a bundle beside its graphs: configs, tokenizer, template, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer

from vlmport.checkpoint import Checkpoint
from vlmport.families.base import HubFiles
from vlmport.tokenizer import read_tokenizer

PARITY_START, PARITY_END = "<!-- parity -->", "<!-- /parity -->"


def write_hub_files(
    checkpoint: Checkpoint, hub: HubFiles, folder: Path, transformers_js: Mapping[str, Any]
) -> None:
    """Write all that a Hub client reads beside onnx/."""
    write_json(folder / "config.json", {**hub.config, "transformers.js_config": transformers_js})
    write_json(folder / "preprocessor_config.json", hub.preprocessor_config)
    write_json(folder / "processor_config.json", hub.processor_config)
    write_json(folder / "generation_config.json", hub.generation_config)
    (folder / "chat_template.jinja").write_text(hub.chat_template, encoding="utf-8")
    _write_tokenizer(checkpoint, hub, folder)
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as Hugging Face does: two spaces, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(checkpoint: Checkpoint, hub: HubFiles, folder: Path) -> None:
    """tokenizer.json with the new tokens; the template goes inside tokenizer_config.json too.

    transformers.js reads the template only there.
    """
    tokenizer = read_tokenizer(checkpoint.folder)
    # Those that have an id too: an ordinary entry of the vocabulary is not found in a text as one.
    tokenizer.add_special_tokens(list(hub.new_tokens))
    config = checkpoint.json("tokenizer_config.json") or {}
    config.pop("auto_map", None)
    config |= {"chat_template": hub.chat_template, **_keep_prompts_bare(tokenizer)}
    # Not by tokenizer.save, whose errors are plain Exceptions: a full disk has to be told apart.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    write_json(folder / "tokenizer_config.json", config)
    special = checkpoint.json("special_tokens_map.json")
    if special is None:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: config[name] for name in names if config.get(name)}
    write_json(folder / "special_tokens_map.json", special)


def _keep_prompts_bare(tokenizer: Tokenizer) -> dict[str, bool]:
    """Let the tokenizer change nothing of a rendered prompt; returns the settings that say so.

    Clients tokenize a prompt with special tokens added, and a tokenizer that was saved after
    training still cuts and pads as the training did.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not tokenizer.encode("").ids:
        return {}
    tokenizer.post_processor = None
    return {"add_bos_token": False, "add_eos_token": False}


def write_card(
    checkpoint: Checkpoint, hub: HubFiles, folder: Path, *, name: str, forms: Mapping[str, str]
) -> None:
    """The model card: where it comes from, what is inside, how to run it, what was proven.

    Licence and base model are those of the source's own card; where it names none, neither do we.

    Args:
        forms: precision → one line on what it is, with its size.
    """
    source = _source_card(checkpoint.folder)
    data = ModelCardData(
        library_name="transformers.js",
        base_model=source.get("base_model"),
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        language=source.get("language"),
        pipeline_tag=hub.pipeline_tag,
        tags=["onnx", "vlmport"],
    )
    rows = "\n".join(f"| `{precision}` | {text} |" for precision, text in forms.items())
    body = CARD.format(
        name=name, what=hub.description, rows=rows, start=PARITY_START, end=PARITY_END
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _source_card(folder: Path) -> dict[str, Any]:
    """The front matter of the checkpoint's README.md, empty if it has none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return ModelCard(
            path.read_text(encoding="utf-8"), ignore_metadata_errors=True
        ).data.to_dict()
    except Exception:  # a card that YAML can't read says nothing about the model
        return {}


CARD = """\
# {name}

ONNX export of {what}, written by vlmport. `vlmport.json` lists every file with its
size and SHA-256, and everything that a program needs to run the model.

```sh
vlmport caption picture.jpg --model .
```

The folder is also a transformers.js repository.

| precision | what it is |
| --- | --- |
{rows}

## Parity with PyTorch

{start}
Not verified yet: `vlmport verify . --reference CHECKPOINT` writes the table here.
{end}
"""
