"""The built-in models in the layout `genai`: onnxruntime-genai as it is gives the runtime's tokens.

Its ladder climbs them in `make verify-all`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.qwen_layouts.test_genai_client import Client, given
from tests.qwen_layouts.test_trained import CAPTION, Trained, trained
from tests.shapes_qwen import CAPTIONS, KNOWN, QUESTIONS, asked
from vlmport.runtime.model import VLM

__all__ = ["trained"]  # a fixture


def test_onnxruntime_genai(trained: Trained) -> None:
    """Our own pixels: the runtime's tokens, of captions and of questions about one and two."""
    client = Client(trained.genai.folder)
    with VLM.open(trained.hub, precision="fp32") as vlm:
        captions = [{"images": [name], "question": CAPTION} for name in CAPTIONS]
        for one in [*captions, *QUESTIONS]:
            messages, paths = asked(one)
            rgb = [np.asarray(Image.open(path)) for path in paths]
            made = [vlm.components.process_image(picture) for picture in rgb]
            text = vlm.prompter.encode(vlm.prompter.render(messages))
            ids = vlm.prompter.splice(text, [picture.prompt_ids for picture in made])
            inputs = given(ids, [dict(picture.inputs) for picture in made])
            answer = vlm.generate(messages, paths)
            tokens = client.generate(inputs, len(answer.token_ids))
            assert tokens == list(answer.token_ids)
            assert one not in KNOWN or answer.text == one["answer"]
