/** Messages in the chat format: checked, and their pictures taken out (the twin of check_messages in
 * vlmport/runtime/messages.py). */

import type { ImageOptions, Message as PlainMessage } from './bundle/manifest.js';
import type { ErrorCode } from './error-codes.js';
import { VlmportError, didYouMean, firstLine, quoted } from './errors.js';
import type { PictureSource } from './picture.js';

export interface TextPart {
  type: 'text';
  text: string;
}

/**
 * A picture: its own, or without one the next of `images`. Beside it may stand options of the image
 * processor, for this picture alone: `{ type: 'image', url: 'a.png', max_pixels: 50000 }`.
 */
export interface ImagePart {
  type: 'image';
  image?: PictureSource;
  url?: string;
  base64?: string;
  [option: string]: unknown;
}

/** A picture as OpenAI's clients write it. */
export interface ImageUrlPart {
  type: 'image_url';
  image_url: string | { url: string; detail?: 'auto' };
}

export interface Message {
  role: 'system' | 'user' | 'assistant' | 'tool';
  content: string | readonly (TextPart | ImagePart | ImageUrlPart)[];
  // Where the model's chat template reads them.
  name?: string;
  tool_calls?: readonly unknown[];
  tool_call_id?: string;
  reasoning_content?: string;
}

/** Checked messages, every content a list of parts, and the pictures that stand in them. */
export interface Chat {
  readonly messages: readonly (PlainMessage & { readonly content: readonly Part[] })[];
  readonly pictures: readonly PictureSource[];
  /** Of each picture, the options of the image processor that its part carries. */
  readonly options: readonly ImageOptions[];
}

/** An image part: its source, or undefined where the next of `images` is meant. */
interface Image {
  readonly source: PictureSource | undefined;
  readonly options: ImageOptions;
}

type Part = { readonly type: string; readonly text?: string };

const ROLES = ['system', 'user', 'assistant', 'tool'];
const SOURCES = ['image', 'url', 'base64'];
const PARTS = ['text', 'image', 'image_url'];
const EXAMPLE = "[{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: '…' }] }]";
// What Python's str.strip takes from the ends of a text.
const BLANK =
  '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]';
const ENDS = new RegExp(`^${BLANK}+|${BLANK}+$`, 'g');

/** A text without the space around it, as Python strips it. */
export const stripped = (text: string) => text.replace(ENDS, '');

/**
 * Check messages and gather their pictures, in the order in which they stand.
 *
 * `options` are the names of the image processor's options, which an image part may carry.
 *
 * Throws PromptError for a bad role, part or key, and for pictures without a place or the reverse;
 * ImageError for base64 that can't be read.
 */
export function checkMessages(
  messages: readonly Message[],
  images: readonly PictureSource[] = [],
  options: readonly string[] = [],
): Chat {
  if (!Array.isArray(messages) || !messages.length) {
    const message = `messages must be a list of at least one message, got ${kindOf(messages)}`;
    throw new VlmportError('PromptError', 'prompt.wrong-value', message, EXAMPLE);
  }
  checkImages(images);
  const found: Image[] = [];
  const checked = messages.map((message: Message, number) => {
    const parts = partsOf(message, `messages[${number}]`, options).map(part => {
      if ('type' in part) return part;
      found.push(part);
      return { type: 'image' };
    });
    return { ...message, content: parts };
  });
  const waiting = found.filter(one => one.source === undefined).length;
  if (waiting !== images.length) {
    const message = `${count(images.length, 'picture')} given, ${count(waiting, 'image part')} without a picture in the messages`;
    throw refusal('prompt.image-count', message, "each picture needs one { type: 'image' }");
  }
  const rest = [...images];
  const pictures = found.map(one => one.source ?? rest.shift()!);
  try {
    const cloned = structuredClone(checked);
    return { messages: cloned, pictures, options: found.map(one => one.options) };
  } catch (error) {
    const message = `the messages can't be sent to the worker (${firstLine(error)})`;
    throw new VlmportError(
      'PromptError',
      'prompt.wrong-value',
      message,
      'plain data, and pictures as `image` of a part',
    );
  }
}

/** Checked messages with their pictures in their parts. */
export function filled(
  messages: readonly Message[],
  images: readonly PictureSource[] = [],
): Message[] {
  const chat = checkMessages(messages, images);
  const rest = [...chat.pictures];
  return chat.messages.map(message => ({
    ...message,
    content: message.content.map(part =>
      part.type === 'image' ? { ...part, image: rest.shift() } : part,
    ),
  })) as Message[];
}

/** Throws PromptError for one picture in place of a list. */
export function checkImages(images: readonly PictureSource[]): void {
  if (Array.isArray(images)) return;
  const message = `images must be a list of pictures, got ${kindOf(images)}`;
  throw new VlmportError(
    'PromptError',
    'prompt.wrong-value',
    message,
    'put it into a list: images: […]',
  );
}

function partsOf(
  message: Message,
  where: string,
  options: readonly string[],
): readonly (TextPart | Image)[] {
  const isMessage = typeof message === 'object' && message !== null;
  if (!isMessage || !('role' in message) || !('content' in message)) {
    const text = `${where}: expected role and content, got ${kindOf(message)}`;
    throw new VlmportError(
      'PromptError',
      'prompt.wrong-value',
      text,
      "{ role: 'user', content: '…' }",
    );
  }
  const { role, content: given } = message;
  // An assistant that only calls tools.
  const content = given === null && message.tool_calls?.length ? [] : given;
  if (!ROLES.includes(role)) {
    const near = typeof role === 'string' ? didYouMean(role, ROLES) : '';
    const text = `${where}: role ${quoted(role)} is unknown${near}`;
    throw new VlmportError(
      'PromptError',
      'prompt.unknown-role',
      text,
      `one of ${ROLES.join(', ')}`,
    );
  }
  const parts = typeof content === 'string' ? [{ type: 'text' as const, text: content }] : content;
  if (!Array.isArray(parts)) {
    const text = `${where}: content is ${kindOf(content)}`;
    throw new VlmportError('PromptError', 'prompt.wrong-value', text, 'a text or a list of parts');
  }
  return parts.map((part, index) => checkPart(part, `${where}.content[${index}]`, options));
}

type Given = Readonly<Record<string, unknown>>;

function checkPart(part: unknown, where: string, options: readonly string[]): TextPart | Image {
  const { type: kind, ...all } = (typeof part === 'object' && part !== null ? part : {}) as Given;
  // Tables of messages fill every row's keys with null.
  const isThere = ([, value]: [string, unknown]) => value !== null && value !== undefined;
  const given: Given = Object.fromEntries(Object.entries(all).filter(isThere));
  if (kind === 'text' && typeof given.text === 'string') {
    checkKeys(given, ['text'], where);
    checkUnicode(given.text, where);
    return { type: 'text', text: given.text };
  }
  if (kind === 'image_url') {
    checkKeys(given, ['image_url'], where);
    return { source: addressOf(given.image_url, where), options: {} };
  }
  if (kind === 'image') return checkImage(given, all, where, options);
  const isFilm = kind === 'video' || kind === 'video_url';
  const near = typeof kind === 'string' && !isFilm ? didYouMean(kind, PARTS) : '';
  const message = `${where}: expected a text or an image part, got ${kindOf(part)}${near}`;
  const hint = isFilm
    ? 'videos are not read; give some frames as pictures'
    : "{ type: 'text', text: '…' } or { type: 'image' }";
  throw refusal('prompt.unknown-part', message, hint);
}

function checkImage(given: Given, all: Given, where: string, options: readonly string[]): Image {
  if ('path' in given) {
    const hint = "'url', or a File as 'image'";
    throw refusal('prompt.unknown-key', `${where}: a page reads no 'path'`, hint);
  }
  checkKeys(given, [...SOURCES, ...options], where);
  const named = SOURCES.filter(name => name in given);
  if (named.length > 1) {
    const message = `${where}: ${named.map(name => `'${name}'`).join(' and ')}, expected one of them`;
    throw refusal('prompt.several-images', message, 'a part is one image');
  }
  if (!named.length && all.image === null) {
    throw refusal(
      'prompt.image-none',
      `${where}: its image is null`,
      "leave 'image' out or fill it",
    );
  }
  const others = Object.entries(given).filter(([name]) => !SOURCES.includes(name));
  const source = named.length ? sourceOf(named[0]!, given[named[0]!], where) : undefined;
  return { source, options: Object.fromEntries(others) as ImageOptions };
}

function checkKeys(given: Given, known: readonly string[], where: string): void {
  const unknown = Object.keys(given).find(name => !known.includes(name));
  if (unknown === undefined) return;
  const message = `${where}: unknown key ${quoted(unknown)}${didYouMean(unknown, known)}`;
  throw refusal('prompt.unknown-key', message, `known here: type, ${known.join(', ')}`);
}

/** A picture from the key that it stands under. */
function sourceOf(name: string, value: unknown, where: string): PictureSource {
  if (name === 'image') return value as PictureSource; // what it is, toPicture finds out
  if (typeof value !== 'string') {
    const message = `${where}: ${name} is ${kindOf(value)}, expected a text`;
    throw refusal('prompt.wrong-value', message, "files, canvases and pixels go under 'image'");
  }
  if (name === 'url' || /^\s*data:/i.test(value)) return value;
  try {
    return new Blob([Uint8Array.from(atob(value), one => one.charCodeAt(0))]);
  } catch {
    const hint = 'is it whole? toBase64() of a Uint8Array writes it';
    throw new VlmportError(
      'ImageError',
      'image.bad-base64',
      `${where}: not base64: ${quoted(value, 40)}`,
      hint,
    );
  }
}

/** The address in OpenAI's `image_url`: plain, or in an object beside `detail`. */
function addressOf(value: unknown, where: string): string {
  let url = value;
  if (typeof value === 'object' && value !== null) {
    checkKeys(value as Given, ['url', 'detail'], `${where}.image_url`);
    const { detail } = value as Given;
    if (detail !== undefined && detail !== null && detail !== 'auto') {
      const message = `${where}: detail=${quoted(detail)} is not supported`;
      throw refusal(
        'prompt.wrong-value',
        message,
        'imageOptions set how an image is cut and scaled',
      );
    }
    url = (value as Given).url;
  }
  if (typeof url === 'string') return url;
  const hint = "{ type: 'image_url', image_url: { url: 'photo.jpg' } }";
  throw refusal('prompt.wrong-value', `${where}: image_url without a url`, hint);
}

const refusal = (code: ErrorCode, message: string, hint: string) =>
  new VlmportError('PromptError', code, message, hint);

/** Half a surrogate pair is no character, which no tokenizer takes. */
function checkUnicode(text: string, where: string): void {
  const at = text.search(/\p{Surrogate}/u);
  if (at < 0) return;
  const message = `${where}: not Unicode at character ${at}: ${JSON.stringify(text[at])}`;
  throw refusal('prompt.not-unicode', message, 'half a surrogate pair: was a text cut there?');
}

const kindOf = (value: unknown) => quoted(value, 80);

const count = (number: number, noun: string) => `${number} ${noun}${number === 1 ? '' : 's'}`;
