/** The tokenizers that Python refuses are refused here (tests/text/test_hostile_tokenizers.py). */

import { expect, test } from 'vitest';
import { problemsOf } from '../../src/text/tokenizer-checks.js';

const a = { String: 'a' };
const replace = (pattern: unknown, content: string) => ({ type: 'Replace', pattern, content });
const sequence = (name: string, parts: unknown[]) => ({ type: 'Sequence', [name]: parts });
const doubling = Array.from({ length: 30 }, () => replace(a, 'aa'));
let deep: unknown = { type: 'NFC' };
for (let at = 0; at < 20; at++) deep = sequence('normalizers', [deep]);

test.each<[string, object]>([
  ['doubling 30 times', { normalizer: sequence('normalizers', doubling) }],
  ['doubling while decoding', { decoder: sequence('decoders', doubling) }],
  ['a million for each', { normalizer: replace({ Regex: 'a' }, 'a'.repeat(1e6)) }],
  ['for each place', { normalizer: replace({ String: '' }, 'a'.repeat(1000)) }],
  ['a long head', { normalizer: { type: 'Prepend', prepend: 'a'.repeat(1e6) } }],
  ['chunks of nothing', { pre_tokenizer: { type: 'FixedLength', length: 0 } }],
  ['more than there is', { decoder: { type: 'Strip', content: 'a', start: 999_999, stop: 0 } }],
  ['more than a token may have', { decoder: { type: 'Strip', content: 'a', start: 0, stop: 1 } }],
  ['an unknown pattern while decoding', { decoder: replace({ Regex: '(a+)+$' }, '') }],
  ['a long pattern', { pre_tokenizer: { type: 'Split', pattern: { Regex: 'a?'.repeat(2000) } } }],
  ['deep', { normalizer: deep }],
  ['many', { normalizer: sequence('normalizers', Array(100).fill({ type: 'NFC' })) }],
])('%s is refused', (_, raw) => {
  const problems = problemsOf('', raw);
  expect(problems.length).toBeGreaterThan(0);
  expect(problems.join('; ').length).toBeLessThan(400);
});

test.each<[string, unknown]>([
  ['nothing', {}],
  ['no object', [1]],
  ['a usual one', { normalizer: { type: 'NFC' }, decoder: { type: 'ByteLevel' } }],
  ['Metaspace as text', { normalizer: replace({ String: ' ' }, '▁') }],
  ['a pattern of words', { pre_tokenizer: { type: 'Split', pattern: { Regex: '\\p{L}+' } } }],
])('%s is read', (_, raw) => {
  expect(problemsOf('', raw)).toEqual([]);
});
