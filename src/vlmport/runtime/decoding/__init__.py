"""Choose tokens from logits, as Hugging Face's `generate` does.

Read in this order:

- options.py: the options, their checks (option_values.py) and other programs' names for them
  (foreign_options.py)
- processors.py and warpers.py: what the options do to a row of scores; score_rows.py has the maths
- search.py: greedy decoding and sampling, with the random stream of rng.py; beams.py: beam search
- grammar.py: which tokens a JSON schema or a regular expression allows
- prompt_lookup.py: drafts for speculative decoding

`new_search` puts them together for one request. Nothing here knows of graphs, images or bundles.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vlmport.runtime.decoding.beams import BeamSearch
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import Mask, new_processors
from vlmport.runtime.decoding.rng import new_seed
from vlmport.runtime.decoding.search import IndependentSearch, IsStopped, Search, StopCondition

__all__ = ["new_search"]


def new_search(
    options: GenerationOptions,
    *,
    prompt_ids: Sequence[int],
    processors_see_prompt: bool,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    vocab_size: int,
    is_stopped: IsStopped | None = None,
    mask: Mask | None = None,
) -> Search:
    """Make the search that the options ask for: greedy, sampling, beam search or beam sampling.

    Args:
        prompt_ids: the whole prompt, image tokens included.
        processors_see_prompt: whether penalties look at the prompt too, or at new tokens only.
        max_new_tokens: maximum number of new tokens, instead of the one in the options.
        vocab_size: V, the width of the logits.
        is_stopped: called after each token that is not a stop token.
        mask: applied before tokens are chosen, where HF applies prefix_allowed_tokens_fn.

    Raises OptionError for token ids outside the vocabulary, and for options that don't work with
    this prompt.
    """
    stops = frozenset(stop_token_ids)
    processors = new_processors(
        options,
        prompt_ids=prompt_ids,
        processors_see_prompt=processors_see_prompt,
        stop_token_ids=stops,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
        mask=mask,
    )
    seed = None
    if options.do_sample:
        seed = new_seed() if options.seed is None else options.seed
    stop_condition = StopCondition(stops, max_new_tokens, is_stopped)
    if options.num_beams > 1:
        return BeamSearch(options, processors, stop_condition, seed)
    return IndependentSearch(options, processors, stop_condition, seed, vocab_size)
