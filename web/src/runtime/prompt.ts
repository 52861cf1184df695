/**
 * Convert messages to token ids: the chat template, the tokenizer, and the ids of images spliced in
 * (the twin of vlmport/runtime/prompt.py).
 */

import { Template } from '@huggingface/jinja';
import { Tokenizer } from '@huggingface/tokenizers';
import type { BundleFiles } from '../bundle/download.js';
import type { Manifest, Message } from '../bundle/manifest.js';
import { VlmportError, didYouMean, firstLine, quoted } from '../errors.js';
import { freeMark, renamed } from './placeholders.js';
import { problemsOf } from '../text/tokenizer-checks.js';
import { watched } from './watched.js';

const TOKENIZER = 'tokenizer.json';
const CONFIG = 'tokenizer_config.json';
const TEMPLATE = 'chat_template.jinja';
const SPECIAL_TOKENS = [
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
];

// Keys of messages that some templates read.
const KEYS = ['name', 'tool_calls', 'tool_call_id', 'reasoning_content'];

// Python reads tokenizer.json alone. From the other file this library takes settings that change
// the text: by default it removes spaces before full stops and commas.
const AS_WRITTEN = { clean_up_tokenization_spaces: false };

interface TokenizerConfig {
  readonly chat_template?: string | readonly { readonly name: string; readonly template: string }[];
  readonly [name: string]: unknown;
}

/** List the files that a Prompter reads. */
export function promptFiles(manifest: Manifest): string[] {
  return [TOKENIZER, CONFIG, TEMPLATE].filter(name => name in manifest.files);
}

/** A bundle's chat template and tokenizer. */
export class Prompter {
  /** The tokenizer with renamed image tokens, once a text has spelled one. */
  private renamed: { readonly key: string; readonly tokenizer: Tokenizer } | null = null;

  private constructor(
    private readonly spec: Manifest['prompt'],
    private readonly file: string, // tokenizer.json
    readonly tokenizer: Tokenizer,
    private readonly special: Readonly<Record<string, string>>,
    private readonly template: string | undefined,
  ) {}

  /** Throws TokenizerError for a tokenizer that is missing or unreadable. */
  static async open(files: BundleFiles): Promise<Prompter> {
    const texts: Record<string, string> = {};
    for (const name of promptFiles(files.manifest)) texts[name] = await files.text(name);
    try {
      const config = JSON.parse(texts[CONFIG] ?? '{}') as TokenizerConfig;
      const file = texts[TOKENIZER] ?? '';
      const raw = JSON.parse(file) as object;
      const problems = problemsOf(file, raw);
      if (problems.length) {
        const message = `the tokenizer is refused: ${problems.slice(0, 6).join('; ')}`;
        const hint = 'check that the file is that of its publisher';
        throw new VlmportError('TokenizerError', 'tokenizer.refused', message, hint);
      }
      const tokenizer = watched('tokenizer', () => new Tokenizer(raw, AS_WRITTEN));
      const template = templateOf(config) ?? texts[TEMPLATE];
      return new Prompter(files.manifest.prompt, file, tokenizer, specialTokens(config), template);
    } catch (error) {
      if (error instanceof VlmportError) throw error;
      const message = `the tokenizer can't be read: ${firstLine(error).slice(0, 200)}`;
      const hint = 'export the bundle again';
      throw new VlmportError('TokenizerError', 'tokenizer.unreadable', message, hint);
    }
  }

  /** Render messages as text. Throws PromptError where the template refuses the messages. */
  render(messages: readonly Message[]): string {
    return this.marked(messages, this.spec.image_placeholder);
  }

  /** Render messages with `mark` for each placeholder that the template itself writes. */
  private marked(messages: readonly Message[], mark: string): string {
    if (this.template === undefined) {
      const message = 'this bundle has no chat template';
      throw new VlmportError('PromptError', 'template.missing', message, 'export the bundle again');
    }
    try {
      const none = { tools: null, documents: null }; // templates ask whether they are none
      const parts = messages.map(one => ({ ...one, content: asParts(one.content) }));
      const marked = (text: string) => text.replaceAll(this.spec.image_placeholder, () => mark);
      const special = Object.entries(this.special).map(([name, text]) => [name, marked(text)]);
      const named = Object.fromEntries(special) as Record<string, string>;
      const given = { messages: parts, add_generation_prompt: true, ...none, ...named };
      const source = marked(this.template);
      return watched('template', () => new Template(source).render(given));
    } catch (error) {
      const message = `the chat template refuses these messages: ${firstLine(error).slice(0, 200)}`;
      const hint = 'check the roles and contents that this model expects';
      throw new VlmportError('PromptError', 'template.refuses', message, hint);
    }
  }

  /** Whether the template takes text next to an image, and shows it to the model. */
  get takesQuestions(): boolean {
    const content = [{ type: 'image' }, { type: 'text', text: 'words' }];
    try {
      return this.render([{ role: 'user', content }]).includes('words');
    } catch {
      return false;
    }
  }

  /** Tokenize a rendered prompt, without adding tokens. */
  encode(text: string): number[] {
    return encoded(this.tokenizer, text);
  }

  /**
   * Tokenize messages, with one placeholder for each image part. A text that spells the
   * placeholder, or the token of an image's rows, is encoded as ordinary characters.
   *
   * Throws PromptError as `render` does, and for a key of a message that the template does not
   * read, because it would have no effect.
   */
  ids(messages: readonly Message[]): number[] {
    this.checkKeys(messages);
    const text = this.render(messages);
    const ids = this.encode(text);
    const mark = freeMark(text);
    const marked = this.marked(messages, mark);
    const { image_placeholder, placeholder_token_id, image_token_id } = this.spec;
    const count = marked.split(mark).length - 1;
    const ofImages = ids.filter(id => id === placeholder_token_id || id === image_token_id).length;
    const asUsual = marked.replaceAll(mark, () => image_placeholder) === text;
    if (asUsual && ofImages === count) return ids;
    const parts = messages.flatMap(one => asParts(one.content));
    const texts = parts.map(part => part.text ?? '').join('');
    const missing = count !== parts.filter(part => part.type === 'image').length;
    // The template builds the placeholder from pieces.
    if (missing && !texts.includes(image_placeholder)) return ids;
    return this.encodeMarked(marked, mark);
  }

  private checkKeys(messages: readonly Message[]): void {
    const words = new Set(this.template?.match(/\w+/g));
    for (const [number, { role: _, content: __, ...others }] of messages.entries()) {
      const isUnread = ([name, value]: [string, unknown]) => !words.has(name) && !isEmpty(value);
      const unread = Object.entries(others).find(isUnread)?.[0];
      if (unread === undefined) continue;
      const near = KEYS.includes(unread) ? '' : didYouMean(unread, ['role', 'content', ...KEYS]);
      const message = `messages[${number}]: ${quoted(unread)}${near}: this model's chat template does not read it`;
      throw new VlmportError(
        'PromptError',
        'prompt.unread-key',
        message,
        'leave it out: it would have no effect',
      );
    }
  }

  /** Tokenize a rendered prompt in which only the marks are placeholders. */
  private encodeMarked(text: string, mark: string): number[] {
    const { image_placeholder, placeholder_token_id, image_token_id } = this.spec;
    const placeholder = this.tokenizer.id_to_token(placeholder_token_id) ?? image_placeholder;
    const row = this.tokenizer.id_to_token(image_token_id) ?? placeholder;
    // The rows of an image may have another token: it gets a name that no text contains.
    const names = new Map([
      [row, freeMark(text)],
      [placeholder, mark],
    ]);
    const key = [...names].flat().join('\n');
    if (this.renamed?.key !== key) {
      const raw = renamed(this.file, names);
      this.renamed = { key, tokenizer: watched('tokenizer', () => new Tokenizer(raw, AS_WRITTEN)) };
    }
    return encoded(this.renamed.tokenizer, text);
  }

  /** Count the placeholders of a prompt. */
  countPlaceholders(ids: readonly number[]): number {
    return ids.filter(id => id === this.spec.placeholder_token_id).length;
  }

  /**
   * Replace the n-th placeholder by the n-th image's ids.
   *
   * Throws PromptError unless there are as many placeholders as images.
   */
  splice(ids: readonly number[], images: readonly (readonly number[])[]): number[] {
    const placeholder = this.spec.placeholder_token_id;
    const places = this.countPlaceholders(ids);
    if (places !== images.length) {
      const { image_placeholder } = this.spec;
      const message = `${images.length} images for ${places} placeholders '${image_placeholder}' in the prompt`;
      const hint =
        places > images.length
          ? 'this chat template writes a placeholder without an image part'
          : "this chat template leaves out an image; put it into a user's message";
      const code = 'prompt.placeholder-count';
      throw new VlmportError('PromptError', code, message, hint);
    }
    let next = 0;
    return ids.flatMap(id => (id === placeholder ? (images[next++] ?? []) : [id]));
  }
}

/** Whether a value is empty, like keys that do not apply in a table of messages. */
function isEmpty(value: unknown): boolean {
  if (value === null || value === undefined || value === '') return true;
  return typeof value === 'object' && Object.keys(value).length === 0;
}

function encoded(tokenizer: Tokenizer, text: string): number[] {
  try {
    return watched('tokenizer', () => tokenizer.encode(text, { add_special_tokens: false }).ids);
  } catch (error) {
    const message = `the tokenizer can't encode this text: ${firstLine(error).slice(0, 200)}`;
    const hint = 'check that it has a token for each character, or one for unknown ones';
    throw new VlmportError('PromptError', 'tokenizer.can-not-encode', message, hint);
  }
}

/** Return a message's content as a list of parts, which templates of vision models expect. */
function asParts(content: Message['content']) {
  return typeof content === 'string' ? [{ type: 'text', text: content }] : content;
}

function templateOf(config: TokenizerConfig): string | undefined {
  const template = config.chat_template;
  if (template === undefined || typeof template === 'string') return template;
  return template.find(one => one.name === 'default')?.template;
}

/**
 * Read the special tokens' texts, which tokenizer_config.json has as texts or as objects. Throws
 * TokenizerError for one of another type.
 */
function specialTokens(config: TokenizerConfig): Record<string, string> {
  const found: Record<string, string> = {};
  for (const name of SPECIAL_TOKENS) {
    const token: unknown = config[name];
    const isObject = typeof token === 'object' && token !== null && !Array.isArray(token);
    const text: unknown = isObject ? Reflect.get(token, 'content') : token;
    if (text === undefined || text === null) continue;
    if (typeof text !== 'string') {
      const message = `tokenizer_config.json: ${name} is ${JSON.stringify(text)}, expected a text`;
      const hint = "give the token as a text, such as '</s>'";
      throw new VlmportError('TokenizerError', 'tokenizer.special-token-type', message, hint);
    }
    found[name] = text;
  }
  return found;
}
