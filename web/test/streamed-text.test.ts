import { expect, test } from 'vitest';
import { stream, uniform } from '../src/runtime/decoding/rng.js';
import { AnswerText } from '../src/runtime/response.js';
import { StopStrings, TextStream } from '../src/runtime/streamed-text.js';

/** Tokens are bytes; the decoder strips a leading space, and a special token gives nothing. */
const bytes = {
  decode: (tokens: number[]) =>
    new TextDecoder('utf-8')
      .decode(Uint8Array.from(tokens.filter(one => one < 256)))
      .replace(/^ /, ''),
  id_to_token: (id: number) => `t${id}`,
};

/**
 * The same with byte fallback: a run of bytes that is not UTF-8 is written character by character.
 */
const fallback = {
  ...bytes,
  id_to_token: (id: number) => `<0x${id.toString(16).padStart(2, '0')}>`,
};

test.each(['a red square', ' leading space', 'é漢🟥 done', '🟥🟦🟩', ''])('%j', text => {
  const tokens = [...new TextEncoder().encode(text)];
  for (const decoder of [bytes, fallback]) {
    const stream = new TextStream(decoder);
    const pieces = tokens.map(token => stream.push(token));
    pieces.push(stream.finish());
    expect(pieces.join('')).toBe(bytes.decode(tokens));
    expect(pieces.some(piece => piece.includes('\ufffd'))).toBe(false);
  }
});

test('half a character at the end comes as the decoder writes it', () => {
  const stream = new TextStream(bytes);
  expect(stream.push(0xf0)).toBe('');
  expect(stream.push(0x9f)).toBe('');
  expect(stream.finish()).toBe('\ufffd');
});

test('a special token has no text', () => {
  const stream = new TextStream(bytes);
  expect([97, 300, 98].map(token => stream.push(token))).toEqual(['a', '', 'b']);
  expect(stream.finish()).toBe('');
});

const SPECIAL = 300; // a token whose text is skipped
/** Bytes, and a special token with a text. */
const special = {
  decode: (tokens: number[], { skip_special_tokens }: { skip_special_tokens: boolean }) => {
    const end = skip_special_tokens ? [] : [...new TextEncoder().encode('<end>')];
    const plain = tokens.flatMap(one => (one === SPECIAL ? end : [one]));
    return new TextDecoder('utf-8').decode(Uint8Array.from(plain));
  },
  id_to_token: (id: number) => `t${id}`,
};

/** Give tokens one by one until a stop string is complete; return the pieces, and the whole. */
function answered(tokens: readonly number[], strings: readonly string[], skips = true) {
  const stops = new StopStrings(special, strings, skips);
  const text = new AnswerText(special, stops, { skipSpecialTokens: skips });
  const pieces: string[] = [];
  for (let made = 1; ; made++) {
    const some = tokens.slice(0, made);
    const last = made === tokens.length ? ('length' as const) : null;
    const stopReason = stops.ends(some) ? ('stop_string' as const) : last;
    pieces.push(text.push(some, stopReason));
    if (stopReason === null) continue;
    const whole = text.whole({ tokens: some, stopReason, score: null, logprobs: null });
    return { pieces, whole, stopReason, made };
  }
}

const bytesOf = (text: string) => [...new TextEncoder().encode(text)];

test.each([
  ['a red square on a table', [' on a '], 'a red square'],
  ['a red square on the table', [' on a '], 'a red square on the table'],
  ['one\n\ntwo', ['\n\n'], 'one'],
  ['aaab', ['aab'], 'a'],
  ['abcabcd', ['abcd', 'bcd'], 'abc'],
  ['é漢🟥 done', ['漢🟥'], 'é'],
  ['é漢🟥', ['never'], 'é漢🟥'],
  ['stop', ['stop'], ''],
])('%j ends before one of %j', (text, strings, before) => {
  const { pieces, whole, stopReason } = answered(bytesOf(text), strings);
  expect(whole.text).toBe(before);
  expect(pieces.join('')).toBe(before);
  expect(stopReason).toBe(before === text ? 'length' : 'stop_string');
  // What is given out never begins a stop string that comes later.
  for (let at = 1; at <= pieces.length; at++) {
    expect(before.startsWith(pieces.slice(0, at).join(''))).toBe(true);
  }
});

test('random texts end before the first stop string, and no piece has a part of it', () => {
  let state = stream(3, 0);
  const next = (below: number) => {
    const [number, after] = uniform(state);
    state = after;
    return Math.floor(number * below);
  };
  const word = (length: number) => Array.from({ length }, () => 'abé'[next(3)]).join('');
  for (let i = 0; i < 300; i++) {
    const [text, strings] = [word(1 + next(20)), [word(1 + next(3)), word(1 + next(3))]];
    const ends = strings
      .map(one => [text.indexOf(one), one] as const)
      .filter(([at]) => at >= 0)
      .map(([at, one]) => at + one.length);
    const first = text.slice(0, Math.min(text.length, ...ends));
    const before = Math.min(
      first.length,
      ...strings.map(one => first.indexOf(one)).filter(at => at >= 0),
    );
    const { pieces, whole } = answered(bytesOf(text), strings);
    expect(whole.text).toBe(first.slice(0, before));
    expect(pieces.join('')).toBe(whole.text);
  }
});

test('the text of a special token may be a stop string, also where it is not shown', () => {
  const tokens = [...bytesOf('ab'), SPECIAL, ...bytesOf('cd')];
  for (const skips of [true, false]) {
    const { whole, pieces, made } = answered(tokens, ['<end>'], skips);
    expect([whole.text, pieces.join(''), made]).toEqual(['ab', 'ab', 3]);
  }
});

test('a stop token has a text only where special tokens are kept', () => {
  const tokens = [...bytesOf('ab'), SPECIAL];
  const hypothesis = { tokens, stopReason: 'stop' as const, score: null, logprobs: null };
  for (const [skips, shown] of [
    [true, 'ab'],
    [false, 'ab<end>'],
  ] as const) {
    const text = new AnswerText(special, null, { skipSpecialTokens: skips });
    expect(text.push(tokens, 'stop')).toBe(shown);
    expect(text.whole(hypothesis).text).toBe(shown);
    expect(text.withoutStopToken(hypothesis)).toBe('ab');
  }
});
