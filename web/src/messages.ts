/** Messages in the chat format: checked, and their pictures taken out (the twin of check_messages in
 * vlmport/runtime/prompt.py). */

import type { Message as PlainMessage } from './bundle/manifest.js';
import { VlmportError, didYouMean, firstLine } from './errors.js';
import type { PictureSource } from './picture.js';

export interface TextPart {
  type: 'text';
  text: string;
}

/** A picture: its own, or without one the next of `images`. */
export interface ImagePart {
  type: 'image';
  image?: PictureSource;
}

export interface Message {
  role: 'system' | 'user' | 'assistant' | 'tool';
  content: string | readonly (TextPart | ImagePart)[];
}

/** Checked messages, every content a list of parts, and the pictures that stand in them. */
export interface Chat {
  readonly messages: readonly (PlainMessage & { readonly content: readonly Part[] })[];
  readonly pictures: readonly PictureSource[];
}

type Part = { readonly type: string; readonly text?: string };

const ROLES = ['system', 'user', 'assistant', 'tool'];
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
 * Throws PromptError for a bad role or part, and for pictures without a place or the reverse.
 */
export function checkMessages(
  messages: readonly Message[],
  images: readonly PictureSource[] = [],
): Chat {
  if (!Array.isArray(messages) || !messages.length) {
    const message = `messages must be a list of at least one message, got ${kindOf(messages)}`;
    throw new VlmportError('PromptError', message, EXAMPLE);
  }
  checkImages(images);
  const rest = [...images];
  const pictures: PictureSource[] = [];
  let waiting = 0;
  const checked = messages.map((message: Message, number) => {
    const parts = partsOf(message, `messages[${number}]`).map(part => {
      if (part.type !== 'image') return part;
      const { image, ...others } = part;
      if (image === undefined) waiting++;
      const picture = image ?? rest.shift();
      if (picture !== undefined) pictures.push(picture);
      return others;
    });
    return { ...message, content: parts };
  });
  if (waiting !== images.length) {
    const message = `${count(images.length, 'picture')} given, ${count(waiting, 'image part')} without a picture in the messages`;
    throw new VlmportError('PromptError', message, "each picture needs one { type: 'image' }");
  }
  try {
    return { messages: structuredClone(checked), pictures };
  } catch (error) {
    const message = `the messages can't be sent to the worker (${firstLine(error)})`;
    throw new VlmportError('PromptError', message, 'plain data, and pictures as `image` of a part');
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
  throw new VlmportError('PromptError', message, 'put it into a list: images: […]');
}

function partsOf(message: Message, where: string): readonly (TextPart | ImagePart)[] {
  const isMessage = typeof message === 'object' && message !== null;
  if (!isMessage || !('role' in message) || !('content' in message)) {
    const text = `${where}: expected role and content, got ${kindOf(message)}`;
    throw new VlmportError('PromptError', text, "{ role: 'user', content: '…' }");
  }
  const { role, content } = message;
  if (!ROLES.includes(role)) {
    const text = `${where}: role '${String(role)}' is unknown${didYouMean(String(role), ROLES)}`;
    throw new VlmportError('PromptError', text, `one of ${ROLES.join(', ')}`);
  }
  const parts = typeof content === 'string' ? [{ type: 'text' as const, text: content }] : content;
  if (!Array.isArray(parts)) {
    const text = `${where}: content is ${kindOf(content)}`;
    throw new VlmportError('PromptError', text, 'a text or a list of parts');
  }
  return parts.map((part, index) => checkPart(part, `${where}.content[${index}]`));
}

function checkPart(part: unknown, where: string): TextPart | ImagePart {
  const given = (typeof part === 'object' ? part : null) as {
    readonly type?: unknown;
    readonly text?: unknown;
    readonly image?: unknown;
  } | null;
  const kind = given?.type;
  if (kind === 'text' && typeof given?.text === 'string') {
    checkUnicode(given.text, where);
    return given as TextPart;
  }
  if (kind === 'image') {
    if (given?.image !== null) return given as ImagePart;
    const hint = "leave 'image' out or fill it";
    throw new VlmportError('PromptError', `${where}: its image is null`, hint);
  }
  if (kind === 'image_url') {
    const hint = "{ type: 'image', image: url }";
    throw new VlmportError('PromptError', `${where}: image_url is not known`, hint);
  }
  const isFilm = kind === 'video' || kind === 'video_url';
  const message = `${where}: expected a text or an image part, got ${kindOf(part)}`;
  const hint = isFilm
    ? 'videos are not read; give some frames as pictures'
    : "{ type: 'text', text: '…' } or { type: 'image' }";
  throw new VlmportError('PromptError', message, hint);
}

/** Half a surrogate pair is no character, which no tokenizer takes. */
function checkUnicode(text: string, where: string): void {
  const at = text.search(/\p{Surrogate}/u);
  if (at < 0) return;
  const message = `${where}: not Unicode at character ${at}: ${JSON.stringify(text[at])}`;
  throw new VlmportError('PromptError', message, 'half a surrogate pair: was a text cut there?');
}

function kindOf(value: unknown): string {
  let text: string;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = Object.prototype.toString.call(value);
  }
  return text.length > 80 ? `${text.slice(0, 77)}…` : text;
}

const count = (number: number, noun: string) => `${number} ${noun}${number === 1 ? '' : 's'}`;
