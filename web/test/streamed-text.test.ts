import { expect, test } from 'vitest';
import { TextStream } from '../src/runtime/streamed-text.js';

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
