"""Ask about a picture with the two graphs of `vlmport export SRC OUT --layout fused`.

A plain loop without vlmport, to be read or ported: ONNX Runtime, numpy, tokenizers and Pillow.
There is no cache: the whole sequence is read again for each token, which is simple and slow.

    python fused_decode.py OUT picture.jpg "What is this?" --precision fp16
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


class Asker:
    """The graphs, the tokenizer and where to stop."""

    def __init__(self, folder, precision):
        folder, suffix = Path(folder), SUFFIXES[precision]
        graphs = json.loads((folder / "vlmport.json").read_text(encoding="utf-8"))["components"]
        vision = folder / graphs["vision"][precision]["model"]  # its name says the size
        self.image_processor = ort.InferenceSession(folder / "image_processor.onnx")
        self.vision = ort.InferenceSession(vision)
        self.decoder = ort.InferenceSession(folder / f"text_with_image{suffix}.onnx")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.image_token_id = config["image_token_id"]
        self.has_default_system = config["model_type"] == "qwen2_5_vl"
        self.stop_ids = set(settings["eos_token_id"])
        self.max_new_tokens = settings["max_new_tokens"]

    def features(self, image):
        """What stands in a prompt for the picture: float32 [tokens, width]."""
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        rgb = np.asarray(image.convert("RGB"))
        (pixels,) = self.image_processor.run(["pixel_values"], {"image": rgb})
        return self.vision.run(["vision_features"], {"pixel_values": pixels})[0]

    def prompt(self, question, tokens):
        """The ids of one question about one picture, as the model's template has it."""
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        text = (
            f"{system if self.has_default_system else ''}<|im_start|>user\n"
            f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def generate(self, image, question):
        """The most likely tokens."""
        features = self.features(image)
        prompt, tokens = self.prompt(question, len(features)), []
        (port,) = (one for one in self.decoder.get_inputs() if one.name == "image_embeds")
        dtype = np.float16 if port.type == "tensor(float16)" else np.float32
        ends = {*self.stop_ids, self.image_token_id}  # no picture belongs to one that it says
        while not tokens or (tokens[-1] not in ends and len(tokens) < self.max_new_tokens):
            ids = np.array([prompt + tokens], np.int64)
            rows = np.zeros((*ids.shape, features.shape[1]), dtype)  # read at image tokens only
            rows[ids == self.image_token_id] = features
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "image_embeds": rows}
            (logits,) = self.decoder.run(["logits"], feeds)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens

    def ask(self, image, question):
        return self.tokenizer.decode(self.generate(image, question)).strip()


def main():
    parser = argparse.ArgumentParser(description="Ask about a picture with two ONNX files.")
    parser.add_argument("folder", help="what `vlmport export --layout fused` wrote")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--precision", default="fp32", choices=SUFFIXES)
    arguments = parser.parse_args()
    asker = Asker(arguments.folder, arguments.precision)
    print(asker.ask(Image.open(arguments.image), arguments.question))


if __name__ == "__main__":
    main()
