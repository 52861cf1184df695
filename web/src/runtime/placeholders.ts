/**
 * Distinguish the placeholders that a template writes from texts that spell one (the twin of
 * vlmport/runtime/prompt.py).
 */

import { VlmportError } from '../errors.js';

interface TokenizerFile {
  added_tokens: { id: number; content: string; normalized: boolean }[];
  model: {
    vocab?: Record<string, number> | [string, number][];
    merges?: (string | [string, string])[];
  };
}

/** Return a mark that does not occur in a text: a number between private characters. */
export function freeMark(text: string): string {
  for (let number = 0; ; number++) {
    const mark = `\ue0f0${number}\ue0f1`;
    if (!text.includes(mark)) return mark;
  }
}

/**
 * Rename some added tokens of a tokenizer.json; all ids stay the same.
 *
 * Throws TokenizerError where one of them is no added token.
 */
export function renamed(text: string, names: ReadonlyMap<string, string>): object {
  const file = JSON.parse(text) as TokenizerFile;
  const found = new Set<string>();
  for (const token of file.added_tokens) {
    const name = names.get(token.content);
    if (name === undefined) continue;
    found.add(token.content);
    Object.assign(token, { content: name, normalized: false });
  }
  if (found.size !== names.size) {
    const spelled = [...names.keys()].map(one => `'${one}'`).join(' or ');
    const message = `a text contains ${spelled}, which this tokenizer can't encode as ordinary characters`;
    throw new VlmportError(
      'TokenizerError',
      'tokenizer.placeholder-in-text',
      message,
      'remove it from the text',
    );
  }
  const { model } = file;
  const nameOf = (token: string) => names.get(token) ?? token;
  if (Array.isArray(model.vocab)) {
    model.vocab = model.vocab.map(([token, score]) => [nameOf(token), score]);
  } else if (model.vocab) {
    const entries = Object.entries(model.vocab).map(([token, id]) => [nameOf(token), id]);
    model.vocab = Object.fromEntries(entries) as Record<string, number>;
  }
  model.merges &&= model.merges.filter(merge => {
    const [left = '', right = ''] = typeof merge === 'string' ? merge.split(' ') : merge;
    return ![left, right, left + right].some(token => names.has(token));
  });
  return file;
}
