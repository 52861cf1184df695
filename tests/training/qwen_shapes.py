"""What the tests of training/shapes_qwen share: untrained checkpoints of both kinds."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from training.shapes_qwen.checkpoint import token_ids, write_checkpoint
from training.shapes_qwen.families import Family
from training.shapes_qwen.model import Chat, model_config
from training.shapes_qwen.prompts import train_tokenizer
from vlmport.families.qwen_vl.reference import QwenVLReference


@dataclass(frozen=True)
class Untrained:
    """A model with random weights, and its folder."""

    family: Family
    tokenizer: Tokenizer
    chat: Chat
    folder: Path

    def reference(self) -> QwenVLReference:
        """Hugging Face's model and processor, read from the folder."""
        config = json.loads((self.folder / "config.json").read_text())
        return QwenVLReference(self.folder, config, config["image_token_id"])


def write_untrained(folder: Path, family: Family) -> Untrained:
    """All weights random, biases and norms too, in half precision as they are stored."""
    tokenizer = train_tokenizer(0)
    torch.manual_seed(0)
    chat = Chat(family, model_config(family, token_ids(tokenizer))).eval()
    for weight in chat.parameters():
        noise = torch.randn_like(weight) * 0.1
        weight.data = (weight.data + noise).half().float()
    write_checkpoint(folder, family, chat.vlm, tokenizer)
    return Untrained(family, tokenizer, chat, folder)
