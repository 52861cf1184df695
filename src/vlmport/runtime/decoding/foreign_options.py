"""Options that do not exist here: the name or the option to use instead.

Names of OpenAI's API, vLLM, llama.cpp, Ollama and transformers.js, and the options of Hugging
Face's `generate` that are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Options of HF that are not supported: the values that ask for nothing, and what to do.
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "assistant_model": ((None,), "prompt_lookup_num_tokens speculates without a second model"),
    "bos_token_id": ((None,), "the bundle's prompt has it already"),
    "constraints": ((None,), "give json_schema or regex"),
    "diversity_penalty": ((None, 0.0), "num_return_sequences with do_sample=True gives variety"),
    "dola_layers": ((None,), "leave it out"),
    "eos_token_id": ((None,), "the bundle names its stop tokens; stop_strings adds to them"),
    "force_words_ids": ((None,), "give json_schema or regex"),
    "forced_bos_token_id": ((None,), "start the answer in the prompt instead"),
    "guidance_scale": ((None, 1.0), "it would need a second, unconditional prompt"),
    "low_memory": ((None, False), "leave it out"),
    "max_time": ((None,), "read .stream(...) and stop when it is time"),
    "num_beam_groups": ((None, 1), "num_return_sequences with do_sample=True gives variety"),
    "output_scores": ((None, False), "logprobs=0 gives each token's log-probability"),
    "output_logits": ((None, False), "logprobs=10 gives the ten best of each step"),
    "pad_token_id": ((None,), "rows are never padded"),
    "penalty_alpha": ((None, 0.0), "leave it out: contrastive search is not computed"),
    "streamer": ((None,), "call .stream(...)"),
    "token_healing": ((None, False), "leave it out"),
    "use_cache": ((None, True), "the cache is always used"),
    "watermarking_config": ((None,), "leave it out"),
}

# Name there → name here.
SAME = {
    "stop": "stop_strings",
    "stop_sequences": "stop_strings",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_gen_len": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "n": "num_return_sequences",
    "best_of": "num_return_sequences",
    "beam_width": "num_beams",
    "beam_size": "num_beams",
    "logit_bias": "sequence_bias",
    "top_logprobs": "logprobs",
    "n_probs": "logprobs",
    "repeat_penalty": "repetition_penalty",
    "typical": "typical_p",
    "random_seed": "seed",
    "bad_words": "bad_words_ids",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "sampling": "do_sample",
}
# Name there → what to do here.
OTHERWISE = {
    "repeat_last_n": "repetition_penalty looks at the whole text",
    "penalize_nl": "leave it out",
    "response_format": "give json_schema",
    "format": "give json_schema",
    "structured_outputs": "give json_schema or regex",
    "grammar": "give json_schema, regex or lark_grammar",
    "guided_choice": "give regex='(yes|no)'",
    "guided_grammar": "give lark_grammar",
    "use_beam_search": "give num_beams=2 or more",
    "stream": "call .stream(...)",
    "echo": "the prompt is not repeated",
    "stop_token_ids": "the bundle names its stop tokens; stop_strings adds to them",
    "include_stop_str_in_output": "a text ends before its stop string; token_ids have it",
    "ignore_eos": "give min_new_tokens",
    "prompt_logprobs": "logprobs are those of the answer",
    "allowed_token_ids": "give regex, or suppress_tokens for all others",
    "logits_processor": "give one of the options that there are",
    "logits_processors": "give one of the options that there are",
    "stopping_criteria": "give stop_strings, or leave the loop of .stream(...)",
    "prefix_allowed_tokens_fn": "give regex or json_schema",
    "generation_config": "give its options by name: **generation_config.to_diff_dict()",
    "return_dict_in_generate": "an answer has token_ids, score and logprobs as they are asked for",
    "num_ctx": "the context is the model's own",
    "n_ctx": "the context is the model's own",
    "keep_alive": "a model stays open until close()",
    "mirostat": "give top_p, min_p or typical_p",
    "mirostat_tau": "give top_p, min_p or typical_p",
    "mirostat_eta": "give top_p, min_p or typical_p",
    "tfs_z": "give typical_p or min_p",
    "min_keep": "leave it out: one token is always kept",
    "tools": "tools are not offered to a template; describe them in the system message",
    "callback_function": "read .stream(...)",
}
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def snake_case(name: str) -> str:
    """Convert a name from JavaScript's form to Python's: maxNewTokens, max_new_tokens."""
    return CAMEL.sub("_", name).lower()


def name_here(name: str) -> str | None:
    """Return the name here of another program's option; None if no option is the same."""
    plain = snake_case(name)
    return SAME.get(plain, plain if plain != name else None)


def instead(name: str) -> str | None:
    """Return what to do instead of another program's option that does not exist here."""
    return OTHERWISE.get(snake_case(name))
