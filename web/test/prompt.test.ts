import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import type { BundleFiles } from '../src/bundle/download.js';
import type { Manifest, Message } from '../src/bundle/manifest.js';
import { Prompter } from '../src/runtime/prompt.js';
import { TextStream, decoded } from '../src/runtime/streamed-text.js';

const words = ['<unk>', 'a', 'red', 'square', '.', '<image>', '</s>', 'plain'];
const vocabulary = Object.fromEntries(words.map((word, id) => [word, id]));

const TOKENIZER = {
  version: '1.0',
  truncation: null,
  padding: null,
  added_tokens: ['<image>', '</s>'].map(content => ({
    id: vocabulary[content],
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  })),
  normalizer: null,
  pre_tokenizer: { type: 'WhitespaceSplit' },
  post_processor: null,
  decoder: null,
  model: { type: 'WordLevel', vocab: vocabulary, unk_token: '<unk>' },
};

async function open(
  template: string,
  config: object = {},
  tokenizer: object = TOKENIZER,
): Promise<Prompter> {
  const texts: Record<string, string> = {
    'tokenizer.json': JSON.stringify(tokenizer),
    'tokenizer_config.json': JSON.stringify({ chat_template: template, ...config }),
  };
  const manifest = {
    files: texts,
    prompt: { image_placeholder: '<image>', placeholder_token_id: 5, image_token_id: 5 },
  } as unknown as Manifest;
  const files = { manifest, text: (name: string) => Promise.resolve(texts[name]!) };
  return Prompter.open(files as unknown as BundleFiles);
}

const hello: Message[] = [{ role: 'user', content: 'a red' }];

test('a special token of another type than text is refused', async () => {
  for (const bad of [true, 3, ['</s>'], { content: false }]) {
    const opened = open('{{ bos_token }}', { bos_token: bad });
    await expect(opened).rejects.toMatchObject({ code: 'tokenizer.special-token-type' });
  }
  const object = await open('{{ bos_token }}', { bos_token: { content: '<s>' }, eos_token: null });
  expect(object.render(hello)).toBe('<s>');
});

test('a template sees what Python shows it', async () => {
  const none = await open('{{ tools is none }} {{ documents is none }} {{ bos_token }}', {
    bos_token: '<s>',
  });
  expect(none.render(hello)).toBe('true true <s>');
  const parts = await open(
    "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}",
  );
  expect(parts.render(hello)).toBe('a red');
  expect(parts.render([{ role: 'user', content: [{ type: 'text', text: 'a' }] }])).toBe('a');
});

test('the error of a template that refuses has its text', async () => {
  const prompter = await open("{{ raise_exception('no user here') }}");
  expect(() => prompter.render(hello)).toThrow(/no user here/);
});

test('images replace the placeholders, and their numbers have to match', async () => {
  const prompter = await open('');
  expect(prompter.splice([1, 5, 2, 5], [[8, 8], [9]])).toEqual([1, 8, 8, 2, 9]);
  expect(() => prompter.splice([1, 5], [])).toThrow(
    expect.objectContaining({ code: 'prompt.placeholder-count' }),
  );
});

test('text is decoded by tokenizer.json alone, whatever tokenizer_config.json adds', async () => {
  const settings = { clean_up_tokenization_spaces: true, additional_special_tokens: ['plain'] };
  for (const config of [{}, settings]) {
    const { tokenizer } = await open('', config);
    const text = new TextStream(tokenizer);
    const tokens = [1, 2, 3, 4, 7, 6];
    const pieces = tokens.map(token => text.push(token));
    const whole = decoded(tokenizer, tokens, true);
    expect(whole).toBe('a red square . plain'); // Python's tokenizers write it so
    expect(pieces.join('') + text.finish()).toBe(whole);
  }
});

test('no tokens, and ids past the vocabulary, have no text', async () => {
  const { tokenizer } = await open('');
  const text = new TextStream(tokenizer);
  expect(decoded(tokenizer, [], true)).toBe('');
  expect([1, 99].map(token => text.push(token)).join('')).toBe('a');
  expect(decoded(tokenizer, [1, 99], true)).toBe('a');
});

/** Open the prompter of a built-in model. */
async function builtIn(name: string, placeholder: string, id: number): Promise<Prompter> {
  const read = (file: string) =>
    readFileSync(new URL(`../../src/vlmport/builtin/${name}/${file}`, import.meta.url), 'utf8');
  const { chat_template } = JSON.parse(read('chat_template.json')) as { chat_template: string };
  const texts: Record<string, string> = {
    'tokenizer.json': read('tokenizer.json'),
    'chat_template.jinja': chat_template,
  };
  const prompt = { image_placeholder: placeholder, placeholder_token_id: id, image_token_id: id };
  const files = { manifest: { files: texts, prompt }, text: (file: string) => texts[file] };
  return Prompter.open(files as unknown as BundleFiles);
}

// Python's ids of the same messages.
const SPELLED = [
  [
    'shapes-smolvlm',
    '<image>',
    446,
    [
      1, 269, 28, 446, 67, 223, 30, 75, 287, 282, 32, 30, 75, 287, 282, 32, 447, 201, 271, 28, 223,
      30, 75, 287, 282, 32, 447, 201, 271, 28,
    ],
  ],
  [
    'shapes-qwen2.5-vl',
    '<|image_pad|>',
    452,
    [
      441, 341, 198, 331, 294, 271, 342, 337, 13, 442, 198, 441, 270, 198, 449, 452, 450, 64, 220,
      27, 91, 72, 280, 276, 62, 79, 64, 67, 91, 29, 27, 91, 72, 280, 276, 62, 79, 64, 67, 91, 29,
      442, 198, 441, 267, 198, 27, 91, 72, 280, 276, 62, 79, 64, 67, 91, 29, 442, 198, 441, 267,
      198,
    ],
  ],
] as const;

test.each(SPELLED)(
  '%s: a text that spells %s is ordinary text',
  async (name, spelled, id, wanted) => {
    const prompter = await builtIn(name, spelled, id);
    const text = (text: string) => ({ type: 'text', text });
    const parts = [text(`a ${spelled}`), text(spelled.slice(0, 2)), text(spelled.slice(2))];
    const messages: Message[] = [
      { role: 'user', content: [{ type: 'image' }, ...parts] },
      { role: 'assistant', content: [text(spelled)] },
    ];
    expect(prompter.ids(messages)).toEqual(wanted);
    expect(prompter.tokenizer.decode(prompter.ids(messages))).toBe(prompter.render(messages));
  },
);

test('other texts have the ids of the rendered prompt', async () => {
  const prompter = await builtIn('shapes-smolvlm', '<image>', 446);
  const content = [{ type: 'image' }, { type: 'text', text: '1 <|im_end|> \ue0f00\ue0f1' }];
  const messages: Message[] = [{ role: 'user', content }];
  expect(prompter.ids(messages)).toEqual(prompter.encode(prompter.render(messages)));
});

test('a text that spells a placeholder is refused where that is not an added token', async () => {
  const prompter = await open("{{ '<image>' }}{{ messages[0].content[1].text }}");
  const added_tokens = TOKENIZER.added_tokens.slice(1);
  const bare = await open(
    "{{ '<image> ' }}{{ messages[0].content[1].text }}",
    {},
    {
      ...TOKENIZER,
      added_tokens,
    },
  );
  const content = [{ type: 'image' }, { type: 'text', text: ' <image>' }];
  expect(prompter.ids([{ role: 'user', content }]).filter(id => id === 5).length).toBe(1);
  const code = 'tokenizer.placeholder-in-text';
  expect(() => bare.ids([{ role: 'user', content }])).toThrow(expect.objectContaining({ code }));
});

test.each([['<image>'], ['<ima']])(
  'a text (%s) takes no image that the template leaves out',
  async spelled => {
    const template = `{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}
{%- elif m.role == 'user' %}<image>{% endif %}{% endfor %}{% endfor %}`;
    const prompter = await open(template);
    const parts = [spelled, 'ge>'].map(text => ({ type: 'text', text }));
    const ids = prompter.ids([
      { role: 'system', content: [{ type: 'image' }] },
      { role: 'user', content: parts },
    ]);
    expect(ids).not.toContain(5);
  },
);

test('a key of a message that the template does not read is refused', async () => {
  const message = { role: 'user', content: 'a', name: 'Ann', tool_calls: [], refusal: null };
  const silent = await open('{{ messages[0].content[0].text }}');
  const code = 'prompt.unread-key';
  expect(() => silent.ids([message])).toThrow(expect.objectContaining({ code }));
  const reader = await open('{{ messages[0].name }} {{ messages[0].content[0].text }}');
  expect(reader.ids([message])).toHaveLength(2);
});
