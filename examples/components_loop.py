"""Caption a picture with the four files of `vlmport export SRC OUT --layout components`.

A plain loop without vlmport, to be read or ported: ONNX Runtime, numpy, tokenizers and Pillow.

    python components_loop.py OUT picture.jpg --precision q8
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps
from tokenizers import Tokenizer

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}


class Captioner:
    """The graphs, the tokenizer and where to stop."""

    def __init__(self, folder, precision):
        folder, suffix = Path(folder), SUFFIXES[precision]
        options = ort.SessionOptions()
        options.enable_mem_pattern = False  # it would make a new plan for each length of the cache

        def graph(path):
            return ort.InferenceSession(folder / path, options)

        self.image_processor = graph("image_processor.onnx")
        self.vision_encoder = graph(f"vision_encoder/model{suffix}.onnx")
        self.projection = graph(f"projection{suffix}.onnx")
        self.prefix_init = graph(f"prefix_init{suffix}.onnx")
        self.language_model = graph(f"language_model/model{suffix}.onnx")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.stop_ids = set(settings["eos_token_id"])
        self.max_new_tokens = settings["max_new_tokens"]

    def prefix(self, image):
        """The picture as the decoder reads it: float32 [1, patches, hidden size]."""
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        rgb = np.asarray(image.convert("RGB"))
        (pixels,) = self.image_processor.run(["pixel_values"], {"image": rgb})
        (hidden,) = self.vision_encoder.run(["last_hidden_state"], {"pixel_values": pixels})
        (prefix,) = self.projection.run(["projected_prefix"], {"vision_hidden_states": hidden})
        return prefix

    def generate(self, image, text=""):
        """The most likely tokens after the picture, and after a text if the model takes one."""
        words = self.tokenizer.encode(text, add_special_tokens=False).ids  # no BOS
        ids = np.array([words], np.int64)  # [1, 0] without a text
        feeds = {"prefix_embeddings": self.prefix(image), "input_ids": ids}
        logits, cache = self.run(self.prefix_init, feeds)
        tokens = [int(logits[0, -1].argmax())]
        while tokens[-1] not in self.stop_ids and len(tokens) < self.max_new_tokens:
            past = next(iter(cache.values())).shape[2]
            feeds = {
                "input_ids": np.array([tokens[-1:]], np.int64),
                "attention_mask": np.ones((1, past + 1), np.int64),
                "position_ids": np.array([[past]], np.int64),
                **cache,
            }
            logits, cache = self.run(self.language_model, feeds)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens

    def run(self, session, feeds):
        """Logits, and the cache under the names under which the next step wants it."""
        names = [output.name for output in session.get_outputs()]
        values = dict(zip(names, session.run(names, feeds), strict=True))
        logits = values.pop("logits")
        return logits, {name.replace("present", "past_key_values"): values[name] for name in values}

    def caption(self, image, text=""):
        return self.tokenizer.decode(self.generate(image, text)).strip()


def main():
    parser = argparse.ArgumentParser(description="Caption a picture with four ONNX files.")
    parser.add_argument("folder", help="what `vlmport export --layout components` wrote")
    parser.add_argument("image")
    parser.add_argument("--precision", default="q8", choices=SUFFIXES)
    arguments = parser.parse_args()
    captioner = Captioner(arguments.folder, arguments.precision)
    print(captioner.caption(Image.open(arguments.image)))


if __name__ == "__main__":
    main()
