import { expect, test } from 'vitest';
import type { VlmportError } from '../src/errors.js';
import { type Message, checkMessages, filled, stripped } from '../src/messages.js';

const A = 'https://example.org/a.png';
const B = new URL('https://example.org/b.png');

test('images are taken out in order', () => {
  const { messages, images } = checkMessages(
    [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: [{ type: 'image' }, { type: 'image', image: B }] },
      { role: 'user', content: [{ type: 'text', text: 'x' }, { type: 'image' }] },
    ],
    [A, A],
  );
  expect(images).toEqual([A, B, A]);
  expect(messages).toEqual([
    { role: 'system', content: [{ type: 'text', text: 'Be brief.' }] },
    { role: 'user', content: [{ type: 'image' }, { type: 'image' }] },
    { role: 'user', content: [{ type: 'text', text: 'x' }, { type: 'image' }] },
  ]);
});

test('a message filled with its images can be checked again', () => {
  const content = [{ type: 'image' as const }, { type: 'text' as const, text: 'x' }];
  const message = filled([{ role: 'user', content }], [B])[0]!;
  expect(message.content[0]).toEqual({ type: 'image', image: B });
  expect(checkMessages([message]).images).toEqual([B]);
  expect(content[0]).toEqual({ type: 'image' });
});

test('other keys of a message are kept, if they can be sent', () => {
  const message = { role: 'tool', content: 'x', name: 'clock' } as Message;
  expect(checkMessages([message]).messages[0]).toMatchObject({ name: 'clock' });
  const odd = { role: 'tool', content: 'x', call: () => 5 } as Message;
  const error = expect.objectContaining({ code: 'prompt.wrong-value' });
  expect(() => checkMessages([odd])).toThrow(error);
});

type Case = readonly [name: string, messages: unknown, code: string, facts: readonly string[]];

test.each<Case>([
  ['no list', 'hello', 'wrong-value', ['messages', '"hello"']],
  ['an empty list', [], 'wrong-value', ['messages', '[]']],
  ['no message', [5], 'wrong-value', ['messages[0]', '5']],
  ['no content', [{ role: 'user' }], 'wrong-value', ['messages[0]', '{"role":"user"}']],
  [
    'a role nearly right',
    [{ role: 'asistant', content: 'x' }],
    'unknown-role',
    ['messages[0]', '"asistant"', "'assistant'"],
  ],
  ['content of another type', [{ role: 'user', content: 5 }], 'wrong-value', ['messages[0]', '5']],
  [
    'a video',
    [{ role: 'user', content: [{ type: 'video' }] }],
    'unknown-part',
    ['messages[0].content[0]', '{"type":"video"}'],
  ],
  [
    'no image',
    [{ role: 'user', content: [{ type: 'image', image: null }] }],
    'image-none',
    ['messages[0].content[0]', 'null'],
  ],
  [
    'a text part without a text',
    [{ role: 'user', content: [{ type: 'text' }] }],
    'unknown-part',
    ['messages[0].content[0]', '{"type":"text"}'],
  ],
  ['no image part', [{ role: 'user', content: 'x' }], 'image-count', ['1 image ', '0 image parts']],
])('%s is refused', (_, messages, code, facts) => {
  const images = code === 'image-count' ? [A] : [];
  try {
    checkMessages(messages as Message[], images);
    expect.unreachable();
  } catch (error) {
    expect(error).toMatchObject({ kind: 'PromptError', code: `prompt.${code}` });
    for (const fact of facts) expect((error as VlmportError).message).toContain(fact);
  }
});

test('a video has its own hint', () => {
  const video = [{ role: 'user', content: [{ type: 'video_url' }] }] as unknown as Message[];
  const hint = expect.stringMatching(/frames/);
  const error = expect.objectContaining({ code: 'prompt.unknown-part', hint });
  expect(() => checkMessages(video)).toThrow(error);
});

test('half a surrogate pair is refused, a whole one is fine', () => {
  expect(checkMessages([{ role: 'user', content: 'fine \ud83d\ude00' }]).images).toEqual([]);
  expect(() => checkMessages([{ role: 'user', content: 'cut \ud83d' }])).toThrow(
    expect.objectContaining({
      code: 'prompt.not-unicode',
      message: expect.stringMatching(/^messages\[0\]\.content\[0\]: .* 4: "\\ud83d"$/),
    }),
  );
});

test('answers are stripped as Python strips them', () => {
  expect(stripped(' \x1c\x85\u3000a b\n\u2029')).toBe('a b');
  expect(stripped('\ufeffa\u200b')).toBe('\ufeffa\u200b'); // Python does not count them as space
});

const messagesWith = (part: object) => [{ role: 'user', content: [part] }] as unknown as Message[];
const OPTIONS = ['max_pixels', 'do_image_splitting'];
const DATA = 'data:image/png;base64,iVBORw0=';

test.each([
  [{ image: A }, A],
  [{ url: A }, A],
  [{ base64: DATA }, DATA],
  [{ image: null, url: A, text: null }, A], // as a table's rows have it
  [{ type: 'image_url', image_url: { url: A, detail: 'auto' } }, A],
  [{ type: 'image_url', image_url: A }, A],
])('an image under any of its keys: %o', (part, wanted) => {
  const chat = checkMessages(messagesWith({ type: 'image', ...part }));
  expect(chat.images).toEqual([wanted]);
  expect(chat.messages[0]!.content).toEqual([{ type: 'image' }]);
});

test('base64 is decoded, with spaces and without padding', async () => {
  const [blob] = checkMessages(messagesWith({ type: 'image', base64: 'AQI\n D/w' })).images;
  expect(new Uint8Array(await (blob as Blob).arrayBuffer())).toEqual(Uint8Array.of(1, 2, 3, 255));
});

test('a part has options of its own image', () => {
  const part = { type: 'image', url: A, max_pixels: 5 };
  expect(checkMessages(messagesWith(part), [], OPTIONS).options).toEqual([{ max_pixels: 5 }]);
});

test.each([
  [{ type: 'image', images: A }, 'unknown-key', "did you mean 'image'?"],
  [{ type: 'image', max_pixel: 5 }, 'unknown-key', "did you mean 'max_pixels'?"],
  [{ type: 'image', path: '/a.png' }, 'unknown-key', "'path'"],
  [{ type: 'text', text: 'x', cache_control: {} }, 'unknown-key', 'cache_control'],
  [{ type: 'image', image: B, url: A }, 'several-images', "'url'"],
  [{ type: 'image', url: 5 }, 'wrong-value', 'url is 5'],
  [{ type: 'imag' }, 'unknown-part', "did you mean 'image'?"],
  [{ type: 'image_url', image_url: { url: A, detail: 'low' } }, 'wrong-value', 'detail'],
  [{ type: 'image_url' }, 'wrong-value', ''],
  [{ type: 'image', base64: 'a*'.repeat(1e6) }, 'bad-base64', ''],
])('%o is refused, and the key is named', (part, name, named) => {
  try {
    checkMessages(messagesWith(part), [], OPTIONS);
    expect.unreachable();
  } catch (error) {
    const { code, message } = error as VlmportError;
    expect(code).toMatch(new RegExp(`^(prompt|image)\\.${name}$`));
    expect(message).toContain('messages[0].content[0]');
    expect(message).toContain(named);
    expect(message.length).toBeLessThan(300);
  }
});

test('no message repeats a long value', () => {
  const long = 'x'.repeat(1e6);
  const words = 'x '.repeat(1e6);
  for (const messages of [
    long,
    [{ role: long, content: 'x' }],
    [{ role: words, content: 'x' }],
    [{ role: words.slice(0, 1500), content: 'x' }],
    [{ role: Object.create(null), content: 'x' }],
    [{ role: 'user', content: [{ type: long }] }],
    messagesWith({ type: 'image', [long]: 1 }),
    messagesWith({ type: 'image', [words]: 1 }),
  ]) {
    try {
      checkMessages(messages as Message[]);
      expect.unreachable();
    } catch (error) {
      const { message, hint } = error as VlmportError;
      expect(`${message}${hint}`).not.toMatch(/(x ?){201}/);
    }
  }
});
