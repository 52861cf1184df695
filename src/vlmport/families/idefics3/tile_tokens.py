"""The tokens that Idefics3's processor writes for a picture's tiles, as a tokenizer knows them."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from vlmport.errors import TokenizerError, some_names
from vlmport.families.idefics3.tiling import TileTokens, Tiling
from vlmport.text.tokenizer import Encoder

IMAGE_TOKEN, FENCE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


def tile_tokens(tokenizer: Tokenizer, tiling: Tiling, count: int) -> TileTokens:
    """The ids of a picture's tokens. Raises TokenizerError naming those that it lacks."""
    most = tiling.most
    names = [f"<row_{r + 1}_col_{c + 1}>" for r in range(most) for c in range(most)]
    ids = Encoder(tokenizer).encode
    single = {name: ids(name) for name in (IMAGE_TOKEN, FENCE, WHOLE, *names)}
    if lacking := [name for name, found in single.items() if len(found) != 1]:
        raise TokenizerError(
            f"the tokenizer has no {some_names(lacking, limit=4)}; pictures have up to {most} "
            f"rows and columns of tiles",
            hint="preprocessor_config.json's size and max_image_size say how many; are all files "
            "of one model?",
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
