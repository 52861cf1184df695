/**
 * Prompt-lookup speculation: draft that the text repeats what came before (the twin of
 * vlmport/runtime/decoding/prompt_lookup.py).
 *
 * The last few tokens are searched earlier in the prompt and in the answer; the tokens after the
 * match are a draft, which the decoder reads together with the last token. One call then gives the
 * logits of several positions. The search chooses at each position as usual, and the first choice
 * that differs from the draft is the last one that counts. So drafts never change the tokens.
 */

/**
 * Return up to `count` ids that followed an earlier occurrence of the last ids; [] for none.
 *
 * The longest match of at most `maxNgram` ids is used, and the earliest of several: in a text that
 * repeats itself it has the longest continuation. The draft ends before an id of `until`.
 */
export function lookUp(
  ids: readonly number[],
  count: number,
  maxNgram: number,
  until: ReadonlySet<number>,
): number[] {
  for (let size = Math.min(maxNgram, ids.length - 1); size > 0; size--) {
    const start = earliest(ids, size);
    if (start === null) continue;
    const draft = ids.slice(start, start + count);
    const end = draft.findIndex(one => until.has(one));
    return end < 0 ? draft : draft.slice(0, end);
  }
  return [];
}

/** Return where the earliest earlier occurrence of the last `size` ids ends; null for none. */
function earliest(ids: readonly number[], size: number): number | null {
  const last = ids.length - size;
  for (let at = 0; at < last; at++) {
    let same = 0;
    while (same < size && ids[at + same] === ids[last + same]) same++;
    if (same === size) return at + size;
  }
  return null;
}
