"""Qwen-VL's side of a conversation: its tokenizer, its templates, its positions, in small."""

import random
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from training.questions import Exchange, conversation, scene_pair
from training.shapes.scenes import random_scene
from training.shapes_qwen.families import QWEN2_5, Family
from training.shapes_qwen.pictures import Grid

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO, VISION_PAD = "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"
SPECIAL = (
    PAD,
    START,
    END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    VISION_PAD,
    IMAGE,
    VIDEO,
)
# As on the Hub: known to the tokenizer, but no special tokens.
ADDED = ("<tool_call>", "</tool_call>")
WORDS = 448  # bytes and merges; all other tokens follow
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nSYSTEM<|im_end|>\n"
    "{% endif %}"
)
_TEMPLATE = (
    "{% for message in messages %}"
    "DEFAULT"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(family: Family) -> str:
    """The family's template, for text and pictures: with its default system message, if any."""
    default = _SYSTEM.replace("SYSTEM", family.system) if family.system else ""
    return _TEMPLATE.replace("DEFAULT", default)


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over conversations, split as Qwen's is, with its special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, use_regex=False, trim_offsets=False
    )
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=False, use_regex=False, trim_offsets=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(random.Random(f"{seed}-qwen-tokenizer")), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    return tokenizer


def _texts(rng: random.Random) -> Iterable[str]:
    for number in range(3000):
        scenes = scene_pair(rng) if number % 3 == 0 else [random_scene(rng)]
        for one in conversation(scenes, rng, turns=6):
            yield from (f"user\n{one.question}", f"assistant\n{one.answer}")
        yield f"system\n{QWEN2_5.system}"


def image_text(grid: Grid) -> str:
    """What stands for a picture in the prompt."""
    return VISION_START + IMAGE * grid.tokens + VISION_END


def render(
    exchanges: Sequence[Exchange], pictures: Sequence[str], family: Family
) -> list[tuple[str, bool]]:
    """A conversation as the template writes it, in parts; True where the model shall speak."""
    parts = [(f"{START}system\n{family.system}{END}\n", False)] if family.system else []
    for one in exchanges:
        shown = "".join(pictures[index] for index in one.images)
        asked = f"{START}user\n{shown}{one.question}{END}\n{START}assistant\n"
        parts += [(asked, False), (f"{one.answer}{END}", True), ("\n", False)]
    return parts


def positions(ids: Sequence[int], image_id: int, grids: Sequence[Grid]) -> np.ndarray:
    """[3, S] int64: time, row and column of each token (M-RoPE).

    Text counts on in all three. A picture's tokens have one time, and rows and columns from
    there; text goes on after the greater of the two.
    Source: transformers 5.23, modeling_qwen3_vl.py, get_rope_index.
    """
    parts, at, begin, shown = [], 0, 0, iter(grids)
    while begin < len(ids):
        if ids[begin] == image_id:
            rows, columns = next(shown).merged
            length = rows * columns
            places = np.indices((1, rows, columns)).reshape(3, -1) + at
            at += max(rows, columns)
        else:
            text = (n for n in range(begin, len(ids)) if ids[n] == image_id)
            length = next(text, len(ids)) - begin
            places = np.tile(np.arange(at, at + length), (3, 1))
            at += length
        parts.append(places)
        begin += length
    return np.concatenate(parts, axis=1)
