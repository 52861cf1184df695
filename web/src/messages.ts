/**
 * Check messages in the chat format, and take their images out (the twin of
 * vlmport/runtime/messages.py).
 */

import type { ImageOptions, Message as PlainMessage } from './bundle/manifest.js';
import type { ErrorCode } from './error-codes.js';
import { VlmportError, didYouMean, firstLine, quoted } from './errors.js';
import type { ImageSource } from './image-source.js';

export interface TextPart {
  type: 'text';
  text: string;
}

/**
 * An image: the part's own, or without one the next of `images`. Other keys are options of the
 * image processor for this image alone: `{ type: 'image', url: 'a.png', max_pixels: 50000 }`.
 */
export interface ImagePart {
  type: 'image';
  image?: ImageSource;
  url?: string;
  base64?: string;
  [option: string]: unknown;
}

/** An image as OpenAI's clients write it. */
export interface ImageUrlPart {
  type: 'image_url';
  image_url: string | { url: string; detail?: 'auto' };
}

export interface Message {
  role: 'system' | 'user' | 'assistant' | 'tool';
  content: string | readonly (TextPart | ImagePart | ImageUrlPart)[];
  // Only for models whose chat template reads them.
  name?: string;
  tool_calls?: readonly unknown[];
  tool_call_id?: string;
  reasoning_content?: string;
}

/** Checked messages, in which every content is a list of parts, and their images. */
export interface Chat {
  readonly messages: readonly (PlainMessage & { readonly content: readonly Part[] })[];
  /** The images, in the order of the image parts. */
  readonly images: readonly ImageSource[];
  /** For each image, the options of the image processor in its part. */
  readonly options: readonly ImageOptions[];
}

/** A checked image part: its source, or undefined where it takes the next of `images`. */
interface CheckedImage {
  readonly source: ImageSource | undefined;
  readonly options: ImageOptions;
}

type Part = { readonly type: string; readonly text?: string };

const ROLES = ['system', 'user', 'assistant', 'tool'];
const SOURCES = ['image', 'url', 'base64'];
const PARTS = ['text', 'image', 'image_url'];
const EXAMPLE = "[{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: '…' }] }]";
// The characters that Python's str.strip removes.
const BLANK =
  '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]';
const ENDS = new RegExp(`^${BLANK}+|${BLANK}+$`, 'g');

/** Remove the space around a text, as Python strips it. */
export const stripped = (text: string) => text.replace(ENDS, '');

/**
 * Check messages, and list their images in order.
 *
 * `options` are the names of the image processor's options, which an image part may contain.
 *
 * Throws PromptError for a wrong role, part or key, and where the number of images is not that of
 * the image parts without one; ImageError for base64 that can't be read.
 */
export function checkMessages(
  messages: readonly Message[],
  images: readonly ImageSource[] = [],
  options: readonly string[] = [],
): Chat {
  if (!Array.isArray(messages) || !messages.length) {
    const message = `messages must be a list of at least one message, got ${kindOf(messages)}`;
    throw new VlmportError('PromptError', 'prompt.wrong-value', message, EXAMPLE);
  }
  checkImages(images);
  const found: CheckedImage[] = [];
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
    const message = `${count(images.length, 'image')} given, but ${count(waiting, 'image part')} without an image in the messages`;
    throw refusal('prompt.image-count', message, "each image needs one part { type: 'image' }");
  }
  const rest = [...images];
  const sources = found.map(one => one.source ?? rest.shift()!);
  try {
    const cloned = structuredClone(checked);
    return { messages: cloned, images: sources, options: found.map(one => one.options) };
  } catch (error) {
    const message = `the messages can't be sent to the worker (${firstLine(error)})`;
    const hint = 'use plain data, and give images as `image` of a part';
    throw refusal('prompt.wrong-value', message, hint);
  }
}

/** Check messages, and put their images into their parts. */
export function filled(
  messages: readonly Message[],
  images: readonly ImageSource[] = [],
): Message[] {
  const chat = checkMessages(messages, images);
  const rest = [...chat.images];
  return chat.messages.map(message => ({
    ...message,
    content: message.content.map(part =>
      part.type === 'image' ? { ...part, image: rest.shift() } : part,
    ),
  })) as Message[];
}

/** Throws PromptError for one image in place of a list. */
export function checkImages(images: readonly ImageSource[]): void {
  if (Array.isArray(images)) return;
  const message = `images must be a list, got ${kindOf(images)}`;
  throw refusal('prompt.wrong-value', message, 'put it into a list: images: […]');
}

function partsOf(
  message: Message,
  where: string,
  options: readonly string[],
): readonly (TextPart | CheckedImage)[] {
  const isMessage = typeof message === 'object' && message !== null;
  if (!isMessage || !('role' in message) || !('content' in message)) {
    const text = `${where}: expected role and content, got ${kindOf(message)}`;
    throw refusal('prompt.wrong-value', text, "for example { role: 'user', content: '…' }");
  }
  const { role, content: given } = message;
  // An assistant may call tools and write no text.
  const content = given === null && message.tool_calls?.length ? [] : given;
  if (!ROLES.includes(role)) {
    const near = typeof role === 'string' ? didYouMean(role, ROLES) : '';
    const text = `${where}: role ${quoted(role)} is unknown${near}`;
    throw refusal('prompt.unknown-role', text, `use one of ${ROLES.join(', ')}`);
  }
  const parts = typeof content === 'string' ? [{ type: 'text' as const, text: content }] : content;
  if (!Array.isArray(parts)) {
    const text = `${where}: content is ${kindOf(content)}`;
    throw refusal('prompt.wrong-value', text, 'use a text or a list of parts');
  }
  return parts.map((part, index) => checkPart(part, `${where}.content[${index}]`, options));
}

type Given = Readonly<Record<string, unknown>>;

function checkPart(
  part: unknown,
  where: string,
  options: readonly string[],
): TextPart | CheckedImage {
  const { type: kind, ...all } = (typeof part === 'object' && part !== null ? part : {}) as Given;
  // In tables of messages, keys that do not apply are null.
  const isGiven = ([, value]: [string, unknown]) => value !== null && value !== undefined;
  const given: Given = Object.fromEntries(Object.entries(all).filter(isGiven));
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
  const isVideo = kind === 'video' || kind === 'video_url';
  const near = typeof kind === 'string' && !isVideo ? didYouMean(kind, PARTS) : '';
  const message = `${where}: expected a text or an image part, got ${kindOf(part)}${near}`;
  const hint = isVideo
    ? 'videos are not supported; give some frames as images'
    : "use { type: 'text', text: '…' } or { type: 'image' }";
  throw refusal('prompt.unknown-part', message, hint);
}

function checkImage(
  given: Given,
  all: Given,
  where: string,
  options: readonly string[],
): CheckedImage {
  if ('path' in given) {
    const hint = "use 'url', or give a File as 'image'";
    throw refusal('prompt.unknown-key', `${where}: a page can't read a 'path'`, hint);
  }
  checkKeys(given, [...SOURCES, ...options], where);
  const named = SOURCES.filter(name => name in given);
  if (named.length > 1) {
    const message = `${where}: ${named.map(name => `'${name}'`).join(' and ')}, expected one of them`;
    throw refusal('prompt.several-images', message, 'use one part for each image');
  }
  if (!named.length && all.image === null) {
    const hint = "leave 'image' out, or give an image";
    throw refusal('prompt.image-none', `${where}: the image is null`, hint);
  }
  const others = Object.entries(given).filter(([name]) => !SOURCES.includes(name));
  const source = named.length ? sourceOf(named[0]!, given[named[0]!], where) : undefined;
  return { source, options: Object.fromEntries(others) as ImageOptions };
}

function checkKeys(given: Given, known: readonly string[], where: string): void {
  const unknown = Object.keys(given).find(name => !known.includes(name));
  if (unknown === undefined) return;
  const message = `${where}: unknown key ${quoted(unknown)}${didYouMean(unknown, known)}`;
  throw refusal('prompt.unknown-key', message, `known keys: type, ${known.join(', ')}`);
}

/** Return an image from the value of its key. */
function sourceOf(name: string, value: unknown, where: string): ImageSource {
  if (name === 'image') return value as ImageSource; // toSentImage checks its type
  if (typeof value !== 'string') {
    const message = `${where}: ${name} is ${kindOf(value)}, expected a text`;
    throw refusal('prompt.wrong-value', message, "give files, canvases and pixels as 'image'");
  }
  if (name === 'url' || /^\s*data:/i.test(value)) return value;
  try {
    return new Blob([Uint8Array.from(atob(value), one => one.charCodeAt(0))]);
  } catch {
    const message = `${where}: not base64: ${quoted(value, 40)}`;
    const hint = 'check that it is complete; toBase64() of a Uint8Array writes base64';
    throw new VlmportError('ImageError', 'image.bad-base64', message, hint);
  }
}

/** Return the address in OpenAI's `image_url`: a text, or an object with `url` and `detail`. */
function addressOf(value: unknown, where: string): string {
  let url = value;
  if (typeof value === 'object' && value !== null) {
    checkKeys(value as Given, ['url', 'detail'], `${where}.image_url`);
    const { detail } = value as Given;
    if (detail !== undefined && detail !== null && detail !== 'auto') {
      const message = `${where}: detail=${quoted(detail)} is not supported`;
      const hint = 'use imageOptions to set how an image is cut and scaled';
      throw refusal('prompt.wrong-value', message, hint);
    }
    url = (value as Given).url;
  }
  if (typeof url === 'string') return url;
  const hint = "for example { type: 'image_url', image_url: { url: 'photo.jpg' } }";
  throw refusal('prompt.wrong-value', `${where}: image_url without a url`, hint);
}

const refusal = (code: ErrorCode, message: string, hint: string) =>
  new VlmportError('PromptError', code, message, hint);

/** Refuse half a surrogate pair: it is not a character, and no tokenizer accepts it. */
function checkUnicode(text: string, where: string): void {
  const at = text.search(/\p{Surrogate}/u);
  if (at < 0) return;
  const message = `${where}: not Unicode at character ${at}: ${JSON.stringify(text[at])}`;
  throw refusal(
    'prompt.not-unicode',
    message,
    'it is half of a surrogate pair: was the text cut there?',
  );
}

const kindOf = (value: unknown) => quoted(value, 80);

const count = (number: number, noun: string) => `${number} ${noun}${number === 1 ? '' : 's'}`;
