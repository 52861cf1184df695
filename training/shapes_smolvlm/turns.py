"""What a kept cache changes over several turns: `python -m training.shapes_smolvlm.turns`.

Holds held-out conversations of several turns with a bundle in two ways: as a conversation, which
keeps its cache from turn to turn, and by prefilling all that was said in it afresh for each
question. At fp32 the two must agree; where activations are scaled by all tokens of a call (q8),
they need not.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

import vlmport
from training.questions import Exchange, conversation, scene_pair
from training.shapes.scenes import draw, random_scene
from vlmport.builtin.scenes import HELD_OUT_SEED
from vlmport.runtime.model import VLM

TURNS = 6


@dataclass
class Tally:
    """Later turns: how many, right with the cache kept, right afresh, of other tokens."""

    asked: int = 0
    kept: int = 0
    afresh: int = 0
    differ: int = 0


def held_out_conversations(count: int) -> Iterator[tuple[list[Exchange], list[Image.Image]]]:
    """Every third about two pictures."""
    rng = random.Random(f"{HELD_OUT_SEED}-held-out-turns")
    for number in range(count):
        scenes = scene_pair(rng) if number % 3 == 2 else [random_scene(rng)]
        yield conversation(scenes, rng, TURNS), [draw(scene) for scene in scenes]


def tally(model: VLM, count: int) -> Tally:
    """Ask every question of every conversation in both ways."""
    found = Tally()
    for exchanges, pictures in held_out_conversations(count):
        chat = model.conversation()
        for turn, one in enumerate(exchanges):
            kept = chat.ask(one.question, pictures if turn == 0 else ())
            if turn:
                afresh = model.generate(chat.messages[:-1])
                found.asked += 1
                found.kept += kept.text.strip() == one.answer
                found.afresh += afresh.text.strip() == one.answer
                found.differ += kept.token_ids != afresh.token_ids
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", default="shapes-smolvlm")
    parser.add_argument("--precisions", default="fp32,q8,q4")
    parser.add_argument("--conversations", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{'':6}{'later turns':>13}{'cache kept':>13}{'afresh':>10}{'differ':>10}")
    for precision in arguments.precisions.split(","):
        with vlmport.load(arguments.bundle, precision=precision) as model:
            one = tally(model, arguments.conversations)
        right = [100 * part / one.asked for part in (one.kept, one.afresh, one.differ)]
        shares = f"{right[0]:11.1f} %{right[1]:8.1f} %{right[2]:8.1f} %"
        print(f"{precision:6}{one.asked:13}{shares}", flush=True)


if __name__ == "__main__":
    main()
