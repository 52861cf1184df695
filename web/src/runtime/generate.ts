/**
 * The generation loop: a request in, tokens out (the twin of vlmport/runtime/generate.py).
 *
 * The prompt is prefilled once, into one row of the cache. From then on each row feeds one token
 * per step, and the request's search chooses from the logits of its rows.
 */

import type { KeyValueCache } from './graphs/cache.js';
import type { Choice } from './decoding/search.js';
import { type Request, draftOf } from './request.js';
import { nextTask } from './tasks.js';

/**
 * Generate until the search is done, and yield the logits of each choice after it. Disposes the
 * request's embeddings.
 *
 * At the end a cache of one row contains the prompt and all new tokens but the last.
 */
export async function* generate(
  cache: KeyValueCache,
  request: Request,
  signal: AbortSignal,
): AsyncGenerator<readonly Float32Array[], void, undefined> {
  const { search, embeds, positions } = request;
  cache.ropeDelta = positions.ropeDelta;
  let logits = await cache.append(embeds, positions.ids);
  let choice = search.choose(logits);
  const made: number[] = []; // the tokens of the one row, for drafts
  let rows: readonly number[] = [0]; // the row of the cache of each row of the search
  yield logits;
  while (!search.done) {
    await nextTask();
    signal.throwIfAborted();
    made.push(choice.tokens[0]!);
    const draft = draftOf(request, made);
    if (draft.length) {
      yield* verified(cache, request, made, draft, last => (choice = last));
      continue;
    }
    rows = cache.reorder(choice.parents.map(parent => rows[parent]!));
    const tokens: number[] = [];
    rows.forEach((row, i) => (tokens[row] = choice.tokens[i]!));
    const found = await cache.step(tokens);
    logits = rows.map(row => found[row]!);
    choice = search.choose(logits);
    yield logits;
  }
}

/**
 * Run a speculative draft in one call, and keep the tokens that the search chooses too. The last
 * token of `made` is run with it; accepted ones are added to `made`.
 */
async function* verified(
  cache: KeyValueCache,
  { search }: Request,
  made: number[],
  draft: readonly number[],
  onChoice: (choice: Choice) => void,
): AsyncGenerator<readonly Float32Array[], void, undefined> {
  const start = cache.length;
  const embeds = await cache.components.embed([made.at(-1)!, ...draft]);
  const all = await cache.append(embeds, undefined, draft.length + 1);
  let read = 0;
  for (const logits of all) {
    const choice = search.choose([logits]);
    read++;
    onChoice(choice);
    const goesOn = !search.done && choice.tokens[0] === draft[read - 1];
    if (!goesOn) cache.truncate(start + read);
    yield [logits];
    if (!goesOn) return;
    made.push(choice.tokens[0]!);
  }
}
