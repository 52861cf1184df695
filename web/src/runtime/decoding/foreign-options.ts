/**
 * Options that do not exist here: the name or the option to use instead (the twin of
 * vlmport/runtime/decoding/foreign_options.py).
 *
 * Names of OpenAI's API, vLLM, llama.cpp, Ollama and transformers.js, and the options of Hugging
 * Face's `generate` that are not supported. All keys are in snake case, as those programs have them.
 */

/** Options of Hugging Face's that are not supported: values that ask for nothing, and what to do. */
export const REFUSED: Readonly<Record<string, readonly [readonly unknown[], string]>> = {
  assistant_model: [[null], 'promptLookupNumTokens speculates without a second model'],
  bos_token_id: [[null], "the bundle's prompt has it already"],
  constraints: [[null], 'give stopStrings, badWordsIds or suppressTokens'],
  diversity_penalty: [[null, 0], 'numReturnSequences with doSample: true gives variety'],
  dola_layers: [[null], 'leave it out'],
  eos_token_id: [[null], 'the bundle names its stop tokens; stopStrings adds to them'],
  force_words_ids: [[null], 'leave it out'],
  forced_bos_token_id: [[null], 'start the answer in the prompt instead'],
  guidance_scale: [[null, 1], 'it would need a second, unconditional prompt'],
  low_memory: [[null, false], 'leave it out'],
  max_time: [[null], 'read .stream(…) and stop when it is time'],
  num_beam_groups: [[null, 1], 'numReturnSequences with doSample: true gives variety'],
  output_scores: [[null, false], "logprobs: 0 gives each token's log-probability"],
  output_logits: [[null, false], 'logprobs: 10 gives the ten best of each step'],
  pad_token_id: [[null], 'rows are never padded'],
  penalty_alpha: [[null, 0], 'leave it out: contrastive search is not computed'],
  streamer: [[null], 'call .stream(…)'],
  token_healing: [[null, false], 'leave it out'],
  use_cache: [[null, true], 'the cache is always used'],
  watermarking_config: [[null], 'leave it out'],
};

/** Name there → name here. */
const SAME: Readonly<Record<string, string>> = {
  stop: 'stopStrings',
  stop_sequences: 'stopStrings',
  max_tokens: 'maxNewTokens',
  max_completion_tokens: 'maxNewTokens',
  max_output_tokens: 'maxNewTokens',
  max_gen_len: 'maxNewTokens',
  num_predict: 'maxNewTokens',
  n_predict: 'maxNewTokens',
  min_tokens: 'minNewTokens',
  n: 'numReturnSequences',
  best_of: 'numReturnSequences',
  beam_width: 'numBeams',
  beam_size: 'numBeams',
  logit_bias: 'sequenceBias',
  top_logprobs: 'logprobs',
  n_probs: 'logprobs',
  repeat_penalty: 'repetitionPenalty',
  typical: 'typicalP',
  random_seed: 'seed',
  bad_words: 'badWordsIds',
  guided_json: 'jsonSchema',
  guided_regex: 'regex',
  sampling: 'doSample',
  abort_signal: 'signal',
  system_prompt: 'system',
};

/** Name there → what to do here. */
const OTHERWISE: Readonly<Record<string, string>> = {
  repeat_last_n: 'repetitionPenalty looks at the whole text',
  penalize_nl: 'leave it out',
  use_beam_search: 'give numBeams: 2 or more',
  stream: 'call .stream(…)',
  echo: 'the prompt is not repeated',
  stop_token_ids: 'the bundle names its stop tokens; stopStrings adds to them',
  include_stop_str_in_output: 'a text ends before its stop string; tokenIds have it',
  ignore_eos: 'give minNewTokens',
  prompt_logprobs: 'logprobs are those of the answer',
  allowed_token_ids: 'give suppressTokens for all others',
  logits_processor: 'give one of the options that there are',
  logits_processors: 'give one of the options that there are',
  stopping_criteria: 'give stopStrings, or leave the loop of .stream(…)',
  prefix_allowed_tokens_fn: 'give suppressTokens or badWordsIds',
  generation_config: 'give its options by name',
  return_dict_in_generate: 'an answer has tokenIds, score and logprobs as they are asked for',
  num_ctx: "the context is the model's own",
  n_ctx: "the context is the model's own",
  keep_alive: 'a model stays open until dispose()',
  mirostat: 'give topP, minP or typicalP',
  mirostat_tau: 'give topP, minP or typicalP',
  mirostat_eta: 'give topP, minP or typicalP',
  tfs_z: 'give typicalP or minP',
  min_keep: 'leave it out: one token is always kept',
  tools: 'tools are not offered to a template; describe them in the system message',
  callback_function: 'read .stream(…)',
};

/** Convert a name from JavaScript's form to Python's: maxNewTokens, max_new_tokens. */
export const snakeCase = (name: string) =>
  name.replace(/(?<=[a-z0-9])(?=[A-Z])/g, '_').toLowerCase();

/** Convert a name from Python's form to JavaScript's. */
export const camelCase = (name: string) =>
  name.replace(/_+([a-z0-9])/g, (_, letter: string) => letter.toUpperCase());

/** Return the name here of another program's option; null if no option is the same. */
export function nameHere(name: string): string | null {
  const plain = snakeCase(name);
  if (Object.hasOwn(SAME, plain)) return SAME[plain]!;
  const here = camelCase(plain);
  return here === name ? null : here;
}

/** Return what to do instead of another program's option that does not exist here. */
export function instead(name: string): string | null {
  const plain = snakeCase(name);
  return Object.hasOwn(OTHERWISE, plain) ? OTHERWISE[plain]! : null;
}
