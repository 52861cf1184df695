/**
 * Check one value of an option, and normalize it (the twin of
 * vlmport/runtime/decoding/option_values.py).
 *
 * Each check takes the option's name and the value, and throws OptionError that names both.
 */

import { VlmportError, quoted } from '../../errors.js';

export type TokenIds = readonly number[];
export type Check<T> = (name: string, value: unknown) => T;

const LARGEST = Number.MAX_SAFE_INTEGER; // larger than any count or token id
const SURROGATE = /\p{Surrogate}/u;

/** Make a check for whole numbers from `least` on. */
export function atLeast(least: number, below: number | null = null): Check<number> {
  return (name, value) => {
    const end = below ?? LARGEST;
    if (isWhole(value) && value >= least && value < end) return value;
    const hasEnd = below !== null || (isWhole(value) && value >= end);
    const range = hasEnd ? `from ${least} to ${end - 1}` : `of at least ${least}`;
    throw wrong(
      name,
      value,
      `a whole number ${range}`,
      `for example ${name}: ${Math.max(least, 8)}`,
    );
  };
}

/** Make a check for finite numbers for which `holds` is true. */
export function numberIn(
  expected: string,
  example: number,
  holds: (value: number) => boolean,
): Check<number> {
  return (name, value) => {
    if (typeof value === 'number' && Number.isFinite(value) && holds(value)) return value;
    throw wrong(name, value, expected, `for example ${name}: ${example}`);
  };
}

/** Check a number above 0. The error for 0 names the option to use instead. */
export const temperature: Check<number> = (name, value) => {
  if (value === 0) {
    const message = `${name}=0, expected a number above 0`;
    const hint = 'doSample: false takes the most likely token each time';
    throw new VlmportError('OptionError', 'option.temperature-zero', message, hint);
  }
  return numberIn('a number above 0', 1.2, n => n > 1e-30 && n < 1e30)(name, value);
};

/** Check true or false. */
export const flag: Check<boolean> = (name, value) => {
  if (typeof value === 'boolean') return value;
  throw wrong(name, value, 'true or false', `${name}: true or ${name}: false`);
};

/** Check true, false or "never". */
export const flagOrNever: Check<boolean | 'never'> = (name, value) => {
  if (typeof value === 'boolean' || value === 'never') return value;
  throw wrong(name, value, 'true, false or "never"', `use ${name}: true to stop soonest`);
};

/** Check token ids, given as a list or as one id, and remove duplicates. */
export const tokenIds: Check<TokenIds> = (name, value) => {
  const ids = idsOf(isWhole(value) ? [value] : value);
  if (ids === null) throw wrong(name, value, 'token ids', `for example ${name}: [5, 17]`);
  return [...new Set(ids)];
};

/** Check sequences of at least one token id each, and remove duplicates. */
export const tokenSequences: Check<readonly TokenIds[]> = (name, value) => {
  const sequences = Array.isArray(value) ? value.map(idsOf) : [null];
  const found = new Map<string, TokenIds>();
  for (const one of sequences) {
    if (!one?.length) {
      const example = `for example ${name}: [[5], [17, 4]]`;
      throw wrong(name, value, 'a list of lists of token ids', example);
    }
    if (!found.has(one.join())) found.set(one.join(), one);
  }
  return [...found.values()];
};

/** Check a Map or a list of pairs: [[[5, 17], -2.0]]; the last duplicate counts. */
export const sequenceBias: Check<readonly (readonly [TokenIds, number])[]> = (name, value) => {
  const pairs = value instanceof Map ? [...value] : value;
  const found = new Map<string, readonly [TokenIds, number]>();
  for (const pair of Array.isArray(pairs) ? pairs : [null]) {
    const [sequence, bias] = isPair(pair) ? pair : [];
    const ids = idsOf(sequence);
    // -Infinity forbids the sequence.
    if (!ids?.length || typeof bias !== 'number' || !(bias < Infinity)) {
      const expected = 'sequences of token ids with a number each';
      throw wrong(name, value, expected, `for example ${name}: [[[5, 17], -2.0]]`);
    }
    found.set(ids.join(), [ids, bias]);
  }
  return [...found.values()];
};

/** Check [start, factor]: a whole number and a positive number. */
export const decay: Check<readonly [number, number]> = (name, value) => {
  if (!isPair(value)) throw wrong(name, value, '[start, factor]', `for example ${name}: [15, 1.1]`);
  const positive = numberIn('a factor above 0', 1.1, n => n > 0);
  return [atLeast(0)(`${name}[0]`, value[0]), positive(`${name}[1]`, value[1])];
};

/** Check one text or several, none of them empty, and remove duplicates. */
export const strings: Check<readonly string[]> = (name, value) => {
  const several: unknown = typeof value === 'string' ? [value] : value;
  const areTexts = (list: unknown): list is string[] =>
    Array.isArray(list) && list.every(one => typeof one === 'string' && one !== '');
  if (!areTexts(several)) {
    const example = `for example ${name}: ['\\n\\n']`;
    throw wrong(name, value, 'a text or several, none empty', example);
  }
  several.forEach(one => checkUnicode(name, one));
  return [...new Set(several)];
};

/** Check that a regular expression is a text; the grammar compiles it. */
export const pattern: Check<string> = (name, value) => {
  if (typeof value !== 'string' || !value) {
    throw wrong(name, value, 'a regular expression', `for example ${name}: '(yes|no)'`);
  }
  checkUnicode(name, value);
  return value;
};

/** Return the text of a JSON schema that is an object or a text. */
export const schema: Check<string> = (name, value) => {
  let parsed: unknown = value;
  let text: string | undefined;
  try {
    if (typeof value === 'string') parsed = JSON.parse(value);
    const isSchema = typeof parsed === 'boolean' || (isObject(parsed) && !Array.isArray(parsed));
    if (isSchema) text = JSON.stringify(parsed);
  } catch {
    // The text is no JSON, or the object has a circle.
  }
  if (text === undefined) {
    throw wrong(name, value, 'a JSON schema', `for example ${name}: { type: 'object' }`);
  }
  JSON.stringify(parsed, (key, inner: unknown) => {
    for (const one of [key, inner]) if (typeof one === 'string') checkUnicode(name, one);
    return inner;
  });
  return text;
};

/** Throws OptionError for half a surrogate pair, which is not Unicode. */
function checkUnicode(name: string, text: string): void {
  const at = text.search(SURROGATE);
  if (at < 0) return;
  const message = `${name}=${quoted(text)}: not Unicode at character ${at}`;
  throw new VlmportError('OptionError', 'option.not-unicode', message, 'use whole characters');
}

function wrong(name: string, value: unknown, expected: string, hint: string): VlmportError {
  const message = `${name}=${shown(value)}, expected ${expected}`;
  return new VlmportError('OptionError', 'option.wrong-value', message, hint);
}

/** Write a value for a message. JSON has no NaN and no infinities. */
const shown = (value: unknown) => (typeof value === 'number' ? String(value) : quoted(value));

const isWhole = (value: unknown): value is number => Number.isInteger(value);
const isObject = (value: unknown): value is object => typeof value === 'object' && value !== null;
const isPair = (value: unknown): value is [unknown, unknown] =>
  Array.isArray(value) && value.length === 2;

/** Return token ids, or null unless it is a list of whole numbers from 0 on. */
function idsOf(value: unknown): number[] | null {
  const isTyped = ArrayBuffer.isView(value) && !(value instanceof DataView);
  const list: unknown[] | null = isTyped
    ? Array.from(value as unknown as ArrayLike<number | bigint>, Number)
    : Array.isArray(value)
      ? value
      : null;
  const areIds = (ids: unknown[]): ids is number[] =>
    ids.every(one => isWhole(one) && one >= 0 && one < LARGEST);
  return list !== null && areIds(list) ? [...list] : null;
}
