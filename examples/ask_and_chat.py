"""Ask questions about images: one by itself, a conversation, and an answer in JSON.

    python ask_and_chat.py

Runs on the built-in shapes-smolvlm. `--model` takes any bundle whose model answers questions.
"""

import argparse
from pathlib import Path

import vlmport

IMAGES = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes-smolvlm")
    arguments = parser.parse_args()
    with vlmport.load(arguments.model) as model:
        one_question(model)
        conversation(model)
        fixed_choices(model)


def one_question(model):
    """Messages in the chat format. Each image part takes the next of `images`."""
    content = [{"type": "image"}, {"type": "text", "text": "what color is the square?"}]
    answer = model.generate([{"role": "user", "content": content}], [IMAGES / "red_square.png"])
    print("one question:", answer.text.strip())


def conversation(model):
    """A later question neither encodes the image again nor reads the earlier turns again."""
    chat = model.conversation()
    image = IMAGES / "green_triangle_purple_circle.png"
    print("first:", chat.ask("how many shapes are there?", images=[image]).text.strip())
    print("then:", end=" ", flush=True)
    for piece in chat.stream("what is below the green triangle?"):
        print(piece.lstrip(), end=" ", flush=True)
    counts = chat.last.counts
    print(f"({counts['cached_tokens']} of {counts['prompt_tokens']} prompt tokens were cached)")


def fixed_choices(model):
    """A regular expression limits the answer. It needs `pip install 'vlmport[grammar]'`."""
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    messages = [{"role": "user", "content": content}]
    try:
        answer = model.generate(messages, [IMAGES / "yellow_circle.png"], regex=" ?(red|yellow)")
    except vlmport.VlmportError as error:
        print("fixed choices:", error, f"({error.hint})")
    else:
        print("fixed choices:", answer.text.strip())


if __name__ == "__main__":
    main()
