import { expect, test } from 'vitest';
import type { BundleFiles } from '../src/bundle/download.js';
import type { Manifest, Message } from '../src/bundle/manifest.js';
import { Prompter } from '../src/runtime/prompt.js';
import { TextStream } from '../src/runtime/text.js';

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

async function open(template: string, config: object = {}): Promise<Prompter> {
  const texts: Record<string, string> = {
    'tokenizer.json': JSON.stringify(TOKENIZER),
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

test('a template that refuses says what it says', async () => {
  const prompter = await open("{{ raise_exception('no user here') }}");
  expect(() => prompter.render(hello)).toThrow(/refuses these messages: no user here/);
});

test('pictures take the places of the placeholders, as many as there are', async () => {
  const prompter = await open('');
  expect(prompter.splice([1, 5, 2, 5], [[8, 8], [9]])).toEqual([1, 8, 8, 2, 9]);
  expect(() => prompter.splice([1, 5], [])).toThrow(/0 pictures for 1 placeholders/);
});

test('text is decoded by tokenizer.json alone, whatever tokenizer_config.json adds', async () => {
  const settings = { clean_up_tokenization_spaces: true, additional_special_tokens: ['plain'] };
  for (const config of [{}, settings]) {
    const text = new TextStream((await open('', config)).tokenizer);
    const pieces = [1, 2, 3, 4, 7, 6].map(token => text.push(token));
    expect(text.whole()).toBe('a red square . plain'); // Python's tokenizers write it so
    expect(pieces.join('') + text.finish()).toBe(text.whole());
  }
});

test('no tokens are no text, and neither are ids past the vocabulary', async () => {
  const text = new TextStream((await open('')).tokenizer);
  expect(text.whole()).toBe('');
  expect([1, 99].map(token => text.push(token)).join('')).toBe('a');
  expect(text.whole()).toBe('a');
});
