import { expect, test } from 'vitest';
import type { VlmportError } from '../src/errors.js';
import { type Message, checkMessages, filled, stripped } from '../src/messages.js';

const A = 'https://example.org/a.png';
const B = new URL('https://example.org/b.png');

test('pictures are taken out in the order in which they stand', () => {
  const { messages, pictures } = checkMessages(
    [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: [{ type: 'image' }, { type: 'image', image: B }] },
      { role: 'user', content: [{ type: 'text', text: 'x' }, { type: 'image' }] },
    ],
    [A, A],
  );
  expect(pictures).toEqual([A, B, A]);
  expect(messages).toEqual([
    { role: 'system', content: [{ type: 'text', text: 'Be brief.' }] },
    { role: 'user', content: [{ type: 'image' }, { type: 'image' }] },
    { role: 'user', content: [{ type: 'text', text: 'x' }, { type: 'image' }] },
  ]);
});

test('a message filled with its pictures is one that can be checked again', () => {
  const content = [{ type: 'image' as const }, { type: 'text' as const, text: 'x' }];
  const message = filled([{ role: 'user', content }], [B])[0]!;
  expect(message.content[0]).toEqual({ type: 'image', image: B });
  expect(checkMessages([message]).pictures).toEqual([B]);
  expect(content[0]).toEqual({ type: 'image' });
});

test('what a message holds besides is kept, if it can be sent', () => {
  const message = { role: 'tool', content: 'x', name: 'clock' } as Message;
  expect(checkMessages([message]).messages[0]).toMatchObject({ name: 'clock' });
  const odd = { role: 'tool', content: 'x', call: () => 5 } as Message;
  expect(() => checkMessages([odd])).toThrow(/the messages can't be sent to the worker/);
});

test.each([
  ['no list', 'hello', 'messages must be a list of at least one message, got "hello"'],
  ['none', [], 'messages must be a list of at least one message, got []'],
  ['no message', [5], 'messages[0]: expected role and content, got 5'],
  ['no content', [{ role: 'user' }], 'messages[0]: expected role and content, got {"role":"user"}'],
  [
    'a role nearly right',
    [{ role: 'asistant', content: 'x' }],
    'messages[0]: role "asistant" is unknown (did you mean \'assistant\'?)',
  ],
  ['content of no kind', [{ role: 'user', content: 5 }], 'messages[0]: content is 5'],
  [
    'a video',
    [{ role: 'user', content: [{ type: 'video' }] }],
    'messages[0].content[0]: expected a text or an image part, got {"type":"video"}',
  ],
  [
    'no picture',
    [{ role: 'user', content: [{ type: 'image', image: null }] }],
    'messages[0].content[0]: its image is null',
  ],
  [
    'a text of no text',
    [{ role: 'user', content: [{ type: 'text' }] }],
    'messages[0].content[0]: expected a text or an image part, got {"type":"text"}',
  ],
  ['no place', [{ role: 'user', content: 'x' }], '1 picture given, 0 image parts without a'],
])('%s', (_, messages, said) => {
  const images = said.startsWith('1 picture') ? [A] : [];
  expect(() => checkMessages(messages as Message[], images)).toThrow(said);
});

test('a video has its own hint', () => {
  const asked = [{ role: 'user', content: [{ type: 'video_url' }] }] as unknown as Message[];
  expect(() => checkMessages(asked)).toThrow(
    expect.objectContaining({ hint: 'videos are not read; give some frames as pictures' }),
  );
});

test('half a character is named, a whole one is fine', () => {
  expect(checkMessages([{ role: 'user', content: 'fine \ud83d\ude00' }]).pictures).toEqual([]);
  expect(() => checkMessages([{ role: 'user', content: 'cut \ud83d' }])).toThrow(
    expect.objectContaining({
      code: 'prompt.not-unicode',
      message: 'messages[0].content[0]: not Unicode at character 4: "\\ud83d"',
    }),
  );
});

test('answers are stripped as Python strips them', () => {
  expect(stripped(' \x1c\x85\u3000a b\n\u2029')).toBe('a b');
  expect(stripped('\ufeffa\u200b')).toBe('\ufeffa\u200b'); // no space to Python
});

const asked = (part: object) => [{ role: 'user', content: [part] }] as unknown as Message[];
const OPTIONS = ['max_pixels', 'do_image_splitting'];
const DATA = 'data:image/png;base64,iVBORw0=';

test.each([
  [{ image: A }, A],
  [{ url: A }, A],
  [{ base64: DATA }, DATA],
  [{ image: null, url: A, text: null }, A], // as a table's rows have it
  [{ type: 'image_url', image_url: { url: A, detail: 'auto' } }, A],
  [{ type: 'image_url', image_url: A }, A],
])('a picture under any of its names: %o', (part, wanted) => {
  const chat = checkMessages(asked({ type: 'image', ...part }));
  expect(chat.pictures).toEqual([wanted]);
  expect(chat.messages[0]!.content).toEqual([{ type: 'image' }]);
});

test('base64 is decoded, with spaces and without padding', async () => {
  const [blob] = checkMessages(asked({ type: 'image', base64: 'AQI\n D/w' })).pictures;
  expect(new Uint8Array(await (blob as Blob).arrayBuffer())).toEqual(Uint8Array.of(1, 2, 3, 255));
});

test('a part carries options of its own picture', () => {
  const part = { type: 'image', url: A, max_pixels: 5 };
  expect(checkMessages(asked(part), [], OPTIONS).options).toEqual([{ max_pixels: 5 }]);
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
])('%o: what has no meaning is refused by name', (part, name, named) => {
  try {
    checkMessages(asked(part), [], OPTIONS);
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
    asked({ type: 'image', [long]: 1 }),
    asked({ type: 'image', [words]: 1 }),
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
