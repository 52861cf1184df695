/**
 * Every error that a user can cause, with a kind, a hint that says what to do next, and a code.
 *
 * The kinds are the names of the Python package's error classes, and a few of the web's own. A code
 * is a stable name of one problem, the same as in Python.
 */

import type { ErrorCode } from './error-codes.js';

export type ErrorKind =
  | 'BundleError' // a bundle that is missing, incomplete, corrupt or of a newer version
  | 'DownloadError' // the network or the server failed, and trying again did not help
  | 'ImageError' // a picture that can't be read
  | 'PromptError' // messages, template and pictures that don't fit together
  | 'TokenizerError' // tokenizer files missing or unreadable
  | 'DeviceError' // a device that is not there, or that gives wrong numbers
  | 'OptionError' // an option that is unknown or out of its range
  | 'WorkerError'; // the worker could not start, or has ended

/** An error as plain data, as it crosses the border of a worker. */
export interface PlainError {
  readonly kind: ErrorKind;
  readonly message: string;
  readonly hint: string;
  readonly code: ErrorCode;
}

const LONGEST = 200; // characters of any one value in a message
const MESSAGE = 2000; // characters of a whole message: lists of names are the longest
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

/** A value as it is written, cut where it is long: for a message that repeats it. */
export function quoted(value: unknown, width = LONGEST): string {
  let text: string;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = Object.prototype.toString.call(value);
  }
  return cut(text, width);
}

/** A text, cut where it is long. */
export function cut(text: string, width = LONGEST): string {
  return text.length > width ? `${text.slice(0, width - 1)}…` : text;
}

/** A message that repeats no value of any length: what has no space is cut, and so is a message
 * that is longer than any of ours. */
function bounded(text: string): string {
  const shorter = text.replace(RUN, run => cut(run));
  return shorter.length > MESSAGE ? `${shorter.slice(0, 139)} … ${shorter.slice(-58)}` : shorter;
}

/** Any thrown value as an error of ours; what nobody foresaw gets `kind` and asks for a report. */
export function asVlmportError(error: unknown, kind: ErrorKind): VlmportError {
  if (error instanceof VlmportError) return error;
  const [message, hint] = [firstLine(error), 'please report this'];
  return new VlmportError(kind, 'program.defect', message, hint, { cause: error });
}

/** What a thrown value says, without its later lines. */
export function firstLine(error: unknown): string {
  const text = error instanceof Error ? error.message || error.name : String(error);
  return cut(text.trim().split('\n')[0] ?? '');
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === 'AbortError';
}

const LONGEST_NAME = 100;

/** " (did you mean 'x'?)" for the nearest known name, else an empty string. */
export function didYouMean(name: string, known: Iterable<string>): string {
  if (name.length > LONGEST_NAME) return ''; // every comparison takes its length once more
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
