"""Write the small files of a bundle: configs, tokenizer, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlmport.checkpoint import Checkpoint
from vlmport.families.base import HubFiles
from vlmport.text.tokenizer import read_tokenizer


def write_hub_files(
    checkpoint: Checkpoint, hub: HubFiles, folder: Path, transformers_js: Mapping[str, Any] | None
) -> None:
    """Write all small files that a Hub client reads."""
    client = {} if transformers_js is None else {"transformers.js_config": transformers_js}
    write_json(folder / "config.json", {**hub.config, **client})
    write_json(folder / "preprocessor_config.json", hub.preprocessor_config)
    if hub.processor_config is not None:
        write_json(folder / "processor_config.json", hub.processor_config)
    write_json(folder / "generation_config.json", hub.generation_config)
    if hub.chat_template is not None:
        (folder / "chat_template.jinja").write_text(hub.chat_template, encoding="utf-8")
    _write_tokenizer(checkpoint, hub, folder)
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as Hugging Face does: two spaces, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(checkpoint: Checkpoint, hub: HubFiles, folder: Path) -> None:
    """Write tokenizer.json with the new tokens, and the template into tokenizer_config.json.

    transformers.js reads the template only there.
    """
    tokenizer = read_tokenizer(checkpoint.tokenizer_folder)
    # Also those that have an id: an ordinary entry of the vocabulary is not found whole in a text.
    tokenizer.add_special_tokens(list(hub.new_tokens))
    config = checkpoint.json("tokenizer_config.json") or {}
    config.pop("auto_map", None)
    config |= _keep_prompts_bare(tokenizer)
    if hub.chat_template is not None:
        config["chat_template"] = hub.chat_template
    # Not by tokenizer.save, whose errors are plain Exceptions: a full disk needs its own error.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    write_json(folder / "tokenizer_config.json", config)
    special = checkpoint.json("special_tokens_map.json")
    if special is None:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: config[name] for name in names if config.get(name)}
    write_json(folder / "special_tokens_map.json", special)


def _keep_prompts_bare(tokenizer: Tokenizer) -> dict[str, bool]:
    """Make the tokenizer leave a rendered prompt unchanged; return the settings for that.

    Clients tokenize a prompt with special tokens added, and a tokenizer that was saved after
    training still cuts and pads as the training did.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not tokenizer.encode("").ids:
        return {}
    tokenizer.post_processor = None
    return {"add_bos_token": False, "add_eos_token": False}
