/** Options of a call, checked and merged with a model's own, as in Python (testdata/golden). */

import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { VlmportError } from '../../src/errors.js';
import { REFUSED, camelCase, snakeCase } from '../../src/runtime/decoding/foreign-options.js';
import type { DecodingOptions } from '../../src/runtime/decoding/generate-options.js';
import { DEFAULTS, merged, optionsOf } from '../../src/runtime/decoding/options.js';
import type { GenerationOptions } from '../../src/runtime/decoding/options.js';

type Options = Readonly<Record<string, unknown>>;

interface Case {
  readonly defaults: Options;
  readonly given: Options;
  /** The options that differ from the defaults, or the code of the error. */
  readonly options?: Options;
  readonly code?: string;
  /** The defaults that are left out. */
  readonly left_out?: readonly string[];
}

const file = new URL('../../../testdata/golden/options.json', import.meta.url);
const { cases } = JSON.parse(readFileSync(file, 'utf8')) as { cases: Case[] };

const camel = (options: Options) =>
  Object.fromEntries(Object.entries(options).map(([name, value]) => [camelCase(name), value]));

test.each(cases.map(one => [JSON.stringify([one.defaults, one.given]), one] as const))(
  '%s',
  (_, { defaults, given, options, code, left_out }) => {
    const left: string[] = [];
    const run = () => merged(defaults, camel(given), undefined, message => left.push(message));
    if (code !== undefined) {
      expect(run).toThrow(expect.objectContaining({ kind: 'OptionError', code }));
      return;
    }
    const { seed, ...found } = run();
    const { seed: wanted, ...others } = camel(options!);
    expect(found).toEqual({ ...DEFAULTS, ...others, seed: undefined });
    if (wanted === 'drawn') expect(Number.isInteger(seed)).toBe(true);
    else expect(seed).toBe(wanted ?? null);
    expect(left.length).toBe(left_out!.length);
    left_out!.forEach((name, i) => {
      expect(left[i]).toContain(name);
      expect(left[i]).toMatch(/^generation_config\.json: .*; left out$/);
    });
  },
);

type Missing = Exclude<keyof GenerationOptions, keyof DecodingOptions>;
type Extra = Exclude<keyof DecodingOptions, keyof GenerationOptions>;

test('the type of a call has all options, and no others', () => {
  const differing: (Missing | Extra)[] = []; // its type is never[], or tsc says which differ
  const none: never[] = differing;
  expect(none).toEqual([]);
});

test('names have the same options in both forms', () => {
  const names = Object.keys(DEFAULTS);
  expect(names.map(name => camelCase(snakeCase(name)))).toEqual(names);
});

test.each(Object.keys(DEFAULTS))('%s: null is the value that does nothing', name => {
  expect(optionsOf({ topK: 0, [name]: null })).toEqual(optionsOf({ topK: 0 }));
});

test.each(Object.keys(REFUSED))('%s is refused by its name, with what to do instead', name => {
  const wrong = { kind: 'OptionError', code: 'option.unsupported' };
  for (const given of [name, camelCase(name)]) {
    expect(() => optionsOf({ [given]: 7 })).toThrow(expect.objectContaining(wrong));
    for (const neutral of REFUSED[name]![0]) {
      expect(optionsOf({ [given]: neutral })).toEqual(DEFAULTS);
    }
  }
});

test.each([
  ['max_tokens', "'maxNewTokens'"],
  ['num_beams', "'numBeams'"],
  ['repeatPenalty', "'repetitionPenalty'"],
  ['numBeam', "'numBeams'"],
  ['temprature', "'temperature'"],
])('%s is unknown, and the message names %s', (name, here) => {
  expect(() => optionsOf({ [name]: 2 })).toThrow(
    expect.objectContaining({ code: 'option.unknown', message: expect.stringContaining(here) }),
  );
});

test('options that another program has get a hint', () => {
  expect(() => optionsOf({ repeatLastN: 1 })).toThrow(
    expect.objectContaining({ hint: expect.stringContaining('repetitionPenalty') }),
  );
});

test('values that JSON does not have', () => {
  const wrong = (given: Options) => {
    expect(() => optionsOf({ doSample: true, ...given })).toThrow(VlmportError);
  };
  wrong({ temperature: NaN });
  wrong({ sequenceBias: new Map([[[1], Infinity]]) });
  wrong({ stopStrings: ['\ud800'] });
  const bias = new Map([[[1, 2], -Infinity]]);
  expect(optionsOf({ sequenceBias: bias }).sequenceBias).toEqual([[[1, 2], -Infinity]]);
  expect(optionsOf({ suppressTokens: Int32Array.of(3, 5, 3) }).suppressTokens).toEqual([3, 5]);
  expect(optionsOf({ numBeams: undefined })).toEqual(DEFAULTS);
});
