"""SmolVLM's side of a conversation: its tokenizer, its template, its tiles, in small.

Sizes: tiles of 96 x 96 give 16 image tokens; a picture's longer side is 192, so it is cut into one
or two rows and columns of tiles, and the whole picture follows as a tile of its own.
"""

import random
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.questions import Exchange, conversation, scene_pair
from training.shapes.scenes import random_scene

TILE, LONGEST_EDGE = 96, 192
TILE_TOKENS = 16
GRID = 6  # the greatest number of rows or columns that the tokenizer has a marker for

PAD, START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
GLOBAL, FAKE, IMAGE = "<global-img>", "<fake_token_around_image>", "<image>"
END = "<end_of_utterance>"
CONTROL = [PAD, START, IM_END]
MARKERS = [
    f"<row_{row}_col_{column}>" for row in range(1, GRID + 1) for column in range(1, GRID + 1)
]
VOCABULARY = 448

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over conversations, with SmolVLM's special tokens and its merged `\\n\\n`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [GLOBAL, *MARKERS, FAKE, IMAGE, END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(random.Random(f"{seed}-smolvlm-tokenizer")), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _texts(rng: random.Random) -> Iterable[str]:
    for number in range(3000):
        scenes = scene_pair(rng) if number % 3 == 0 else [random_scene(rng)]
        exchanges = conversation(scenes, rng, turns=6)
        yield "\n\n".join(f"User: {one.question}\nAssistant: {one.answer}" for one in exchanges)


def image_text(rows: int, columns: int) -> str:
    """What stands for a picture in the prompt; 0 rows where it is not split."""
    patches = IMAGE * TILE_TOKENS
    if not rows:
        return f"{FAKE}{GLOBAL}{patches}{FAKE}"
    lines = [
        "".join(f"{FAKE}<row_{row}_col_{column}>{patches}" for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    ]
    return "\n".join(lines) + f"\n\n{FAKE}{GLOBAL}{patches}{FAKE}"


def render(exchanges: Sequence[Exchange], pictures: Sequence[str]) -> list[tuple[str, bool]]:
    """A conversation as the template writes it, in parts; True where the model shall speak."""
    parts = [(START, False)]
    for one in exchanges:
        shown = "".join(pictures[index] for index in one.images)
        begin = f"User:{shown}" if shown else "User: "
        parts.append((f"{begin}{one.question}{END}\nAssistant:", False))
        parts.append((f" {one.answer}{END}", True))
        parts.append(("\n", False))
    return parts


def tiles(image: Image.Image, *, split: bool) -> tuple[np.ndarray, int, int]:
    """[N, 96, 96, 3] uint8 and the grid's rows and columns: what Idefics3's processor cuts.

    Source: transformers 5.23, image_processing_pil_idefics3.py.
    """
    resized = image.convert("RGB").resize(_longest_edge(*image.size), Image.Resampling.LANCZOS)
    if not split:
        return np.asarray(_square(resized))[None], 0, 0
    columns, rows = (-(-side // TILE) for side in resized.size)
    whole = resized.resize((columns * TILE, rows * TILE), Image.Resampling.LANCZOS)
    if rows == columns == 1:
        return np.asarray(whole)[None], 0, 0
    cut = np.asarray(whole).reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)
    cut = cut.reshape(-1, TILE, TILE, 3)
    return np.concatenate([cut, np.asarray(_square(whole))[None]]), rows, columns


def _longest_edge(width: int, height: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height:
        short = int(LONGEST_EDGE / ratio)
        return LONGEST_EDGE, max(1, short + short % 2)
    short = int(LONGEST_EDGE * ratio)
    return max(1, short + short % 2), LONGEST_EDGE


def _square(image: Image.Image) -> Image.Image:
    return image.resize((TILE, TILE), Image.Resampling.LANCZOS)
