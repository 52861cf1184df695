/**
 * Messages to token ids: the chat template, the tokenizer, and pictures spliced in (the twin of
 * vlmport/runtime/prompt.py, whose checks of messages are on the page, in messages.ts).
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

const KEYS = ['name', 'tool_calls', 'tool_call_id', 'reasoning_content']; // that some templates read

// Python reads tokenizer.json alone; of the other file, this library would take settings that
// change the text (blanks before full stops and commas go, unless it is told otherwise).
const AS_WRITTEN = { clean_up_tokenization_spaces: false };

interface TokenizerConfig {
  readonly chat_template?: string | readonly { readonly name: string; readonly template: string }[];
  readonly [name: string]: unknown;
}

/** The files that a Prompter reads. */
export function promptFiles(manifest: Manifest): string[] {
  return [TOKENIZER, CONFIG, TEMPLATE].filter(name => name in manifest.files);
}

export class Prompter {
  /** The tokenizer with other names for what stands for a picture, once a text has spelled one. */
  private other: { readonly key: string; readonly tokenizer: Tokenizer } | null = null;

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
        const message = `the tokenizer is not read: ${problems.slice(0, 6).join('; ')}`;
        const hint = 'is it as its publisher wrote it?';
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

  /** The prompt as text. Throws PromptError where the template refuses the messages. */
  render(messages: readonly Message[]): string {
    return this.marked(messages, this.spec.image_placeholder);
  }

  /** The prompt as text, with `mark` for each placeholder that the template itself writes. */
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
      const hint = 'roles and content must be as this model expects them';
      throw new VlmportError('PromptError', 'template.refuses', message, hint);
    }
  }

  /** Whether the template takes words beside a picture, and shows them to the model. */
  get takesQuestions(): boolean {
    const content = [{ type: 'image' }, { type: 'text', text: 'words' }];
    try {
      return this.render([{ role: 'user', content }]).includes('words');
    } catch {
      return false;
    }
  }

  /** Token ids of a rendered prompt: nothing is added to it. */
  encode(text: string): number[] {
    return encoded(this.tokenizer, text);
  }

  /**
   * Token ids of messages, a placeholder for each image part. No text becomes one: a text that
   * spells the placeholder, or the token of an image's rows, is encoded as ordinary characters.
   *
   * Throws PromptError as `render` does, and for a key of a message that the template does not read:
   * it would have no effect.
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
    // A template that builds the placeholder of pieces.
    if (missing && !texts.includes(image_placeholder)) return ids;
    return this.encodeMarked(marked, mark);
  }

  private checkKeys(messages: readonly Message[]): void {
    const words = new Set(this.template?.match(/\w+/g));
    for (const [number, { role: _, content: __, ...others }] of messages.entries()) {
      const says = ([name, value]: [string, unknown]) => !words.has(name) && !isEmpty(value);
      const unread = Object.entries(others).find(says)?.[0];
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

  /** A rendered prompt's ids, where a mark is a placeholder and nothing else is. */
  private encodeMarked(text: string, mark: string): number[] {
    const { image_placeholder, placeholder_token_id, image_token_id } = this.spec;
    const placeholder = this.tokenizer.id_to_token(placeholder_token_id) ?? image_placeholder;
    const row = this.tokenizer.id_to_token(image_token_id) ?? placeholder;
    // What a picture's rows have may be another token: it gets a name that no text holds.
    const names = new Map([
      [row, freeMark(text)],
      [placeholder, mark],
    ]);
    const key = [...names].flat().join('\n');
    if (this.other?.key !== key) {
      const raw = renamed(this.file, names);
      this.other = { key, tokenizer: watched('tokenizer', () => new Tokenizer(raw, AS_WRITTEN)) };
    }
    return encoded(this.other.tokenizer, text);
  }

  /** How many pictures a prompt has a place for. */
  countPlaceholders(ids: readonly number[]): number {
    return ids.filter(id => id === this.spec.placeholder_token_id).length;
  }

  /**
   * Replace the n-th placeholder by the n-th picture's ids.
   *
   * Throws PromptError unless there are as many placeholders as pictures.
   */
  splice(ids: readonly number[], images: readonly (readonly number[])[]): number[] {
    const placeholder = this.spec.placeholder_token_id;
    const places = this.countPlaceholders(ids);
    if (places !== images.length) {
      const { image_placeholder } = this.spec;
      const message = `${images.length} pictures for ${places} placeholders '${image_placeholder}' in the prompt`;
      const hint =
        places > images.length
          ? 'this chat template writes it where no image part is'
          : "the template leaves out a picture; put it into a user's message";
      const code = 'prompt.placeholder-count';
      throw new VlmportError('PromptError', code, message, hint);
    }
    let next = 0;
    return ids.flatMap(id => (id === placeholder ? (images[next++] ?? []) : [id]));
  }
}

/** Whether a value says nothing, as tables of messages fill every row's keys. */
function isEmpty(value: unknown): boolean {
  if (value === null || value === undefined || value === '') return true;
  return typeof value === 'object' && Object.keys(value).length === 0;
}

function encoded(tokenizer: Tokenizer, text: string): number[] {
  try {
    return watched('tokenizer', () => tokenizer.encode(text, { add_special_tokens: false }).ids);
  } catch (error) {
    const message = `the tokenizer can't encode this text: ${firstLine(error).slice(0, 200)}`;
    const hint = 'does it have a token for each character, or one for unknown ones?';
    throw new VlmportError('PromptError', 'tokenizer.can-not-encode', message, hint);
  }
}

/** A message's content as a list of parts, as templates of vision models expect it. */
function asParts(content: Message['content']) {
  return typeof content === 'string' ? [{ type: 'text', text: content }] : content;
}

function templateOf(config: TokenizerConfig): string | undefined {
  const template = config.chat_template;
  if (template === undefined || typeof template === 'string') return template;
  return template.find(one => one.name === 'default')?.template;
}

/**
 * Special tokens' texts: tokenizer_config.json has them plain or as objects. Throws TokenizerError
 * for one that is no text.
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
