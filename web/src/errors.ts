/**
 * The error of this package: a kind, a code, a message, and a hint that says what to do next.
 *
 * The kinds are the names of the Python package's error classes, and a few that only the web has. A
 * code is a stable name of one problem, the same as in Python.
 */

import type { ErrorCode } from './error-codes.js';

export type ErrorKind =
  | 'BundleError' // a bundle that is missing, incomplete, corrupt or of a newer version
  | 'DownloadError' // the network or the server failed, also when asked again
  | 'ImageError' // an image that can't be read
  | 'PromptError' // messages, template and images that don't fit together
  | 'TokenizerError' // tokenizer files missing or unreadable
  | 'DeviceError' // a device that is missing, or gives wrong numbers
  | 'OptionError' // an unknown option, or a wrong value
  | 'WorkerError'; // the worker could not start, or has ended

/** An error as plain data, as it is sent from the worker to the page. */
export interface PlainError {
  readonly kind: ErrorKind;
  readonly message: string;
  readonly hint: string;
  readonly code: ErrorCode;
}

const LONGEST = 200; // characters of one value in a message
const MESSAGE = 2000; // characters of a message; lists of names are the longest
const RUN = /\S{201,}/g;

export class VlmportError extends Error {
  override readonly name = 'VlmportError';

  readonly hint: string;

  /** `code` is a stable name of the problem: the text of a message may change. */
  constructor(
    readonly kind: ErrorKind,
    readonly code: ErrorCode,
    message: string,
    hint: string,
    options?: ErrorOptions,
  ) {
    super(bounded(message), options);
    this.hint = bounded(hint);
  }

  static from(plain: PlainError): VlmportError {
    return new VlmportError(plain.kind, plain.code, plain.message, plain.hint);
  }

  toPlain(): PlainError {
    const { kind, message, hint, code } = this;
    return { kind, message, hint, code };
  }
}

/** Write a value for a message; a long one is cut. */
export function quoted(value: unknown, width = LONGEST): string {
  let text: string;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = Object.prototype.toString.call(value);
  }
  return cut(text, width);
}

/** Cut a long text. */
export function cut(text: string, width = LONGEST): string {
  return text.length > width ? `${text.slice(0, width - 1)}…` : text;
}

/**
 * Bound a message that repeats a value: a long run without a space is cut, and so is a message that
 * is longer than all of ours.
 */
function bounded(text: string): string {
  const shorter = text.replace(RUN, run => cut(run));
  return shorter.length > MESSAGE ? `${shorter.slice(0, 139)} … ${shorter.slice(-58)}` : shorter;
}

/**
 * Convert a thrown value to a VlmportError. An unexpected one gets `kind`, and asks for a report.
 */
export function asVlmportError(error: unknown, kind: ErrorKind): VlmportError {
  if (error instanceof VlmportError) return error;
  const [message, hint] = [firstLine(error), 'please report this'];
  return new VlmportError(kind, 'program.defect', message, hint, { cause: error });
}

/** Return the first line of an error's message. */
export function firstLine(error: unknown): string {
  const text = error instanceof Error ? error.message || error.name : String(error);
  return cut(text.trim().split('\n')[0] ?? '');
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === 'AbortError';
}

const LONGEST_NAME = 100; // the time grows with the product of both lengths

/** Return " (did you mean 'x'?)" for the nearest known name, else an empty string. */
export function didYouMean(name: string, known: Iterable<string>): string {
  if (name.length > LONGEST_NAME) return '';
  let best = '';
  let least = Math.floor(name.length * 0.4) + 1;
  for (const candidate of known) {
    const distance = editDistance(name.toLowerCase(), candidate.toLowerCase());
    if (distance < least) [best, least] = [candidate, distance];
  }
  return best ? ` (did you mean '${best}'?)` : '';
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(replaced, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}
