"""Find the tokens that Idefics3's processor writes for an image's tiles, in a tokenizer."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from vlmport.errors import TokenizerError, some_names
from vlmport.families.idefics3.tiling import TileTokens, Tiling
from vlmport.text.tokenizer import Encoder

IMAGE_TOKEN, FENCE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


def tile_tokens(tokenizer: Tokenizer, tiling: Tiling, count: int) -> TileTokens:
    """Find the ids of an image's tokens. Raises TokenizerError naming missing tokens."""
    most = tiling.most
    names = [f"<row_{r + 1}_col_{c + 1}>" for r in range(most) for c in range(most)]
    ids = Encoder(tokenizer).encode
    single = {name: ids(name) for name in (IMAGE_TOKEN, FENCE, WHOLE, *names)}
    if lacking := [name for name, found in single.items() if len(found) != 1]:
        raise TokenizerError(
            f"the tokenizer has no {some_names(lacking, limit=4)}; images have up to {most} "
            f"rows and columns of tiles",
            hint="that number is from size and max_image_size in preprocessor_config.json; do all "
            "files belong to one model?",
            code="tokenizer.missing-tokens",
        )
    markers = np.array([single[name][0] for name in names], np.int64).reshape(most, most)
    return TileTokens(
        fence=single[FENCE][0],
        whole=single[WHOLE][0],
        markers=markers,
        image=single[IMAGE_TOKEN][0],
        count=count,
        newline=ids(f"{IMAGE_TOKEN}\n{FENCE}")[1:-1],
        newlines=ids(f"{IMAGE_TOKEN}\n\n{FENCE}")[1:-1],
    )
