/** The options of calls: their types, and checks that refuse unknown ones. */

import type { ImageOptions } from './bundle/manifest.js';
import { VlmportError, quoted } from './errors.js';
import type { ImageSource } from './image-source.js';
import type { ModelInfo } from './protocol.js';
import type { DecodingOptions } from './runtime/decoding/generate-options.js';
import { type GenerationOptions, merged, unknownOption } from './runtime/decoding/options.js';

export type { DecodingOptions, ImageOptions };

/** Options of a call that generates: how tokens are chosen, and a signal that ends it. */
export interface AnswerOptions extends DecodingOptions {
  signal?: AbortSignal;
}

export interface CaptionOptions extends AnswerOptions {
  /** Options of the image processor, such as `{ do_image_splitting: false }`; they override the
   * bundle's. */
  imageOptions?: ImageOptions;
}

export interface GenerateOptions extends CaptionOptions {
  /** Images for the image parts without one, in order. */
  images?: readonly ImageSource[];
}

/**
 * Merge the decoding options of a call with the model's own defaults. `more` are the names of the
 * call's other options.
 *
 * Throws OptionError for unknown options, values out of range, and options that contradict each
 * other.
 */
export function decodingOptions(
  { defaults, notes }: Pick<ModelInfo, 'defaults' | 'notes'>,
  options: AnswerOptions,
  more: readonly string[] = [],
): GenerationOptions {
  const others = ['signal', ...more];
  const given = Object.entries(options).filter(([name]) => !others.includes(name));
  const leftOut = (message: string) => {
    if (!notes.includes(message)) console.warn(message); // it has an effect in this call only
  };
  return merged(defaults, Object.fromEntries(given), undefined, leftOut, others);
}

/** Throws OptionError where several sequences are asked for, which can't be streamed. */
export function refuseSeveral({ numBeams, numReturnSequences }: GenerationOptions): void {
  if (numBeams === 1 && numReturnSequences === 1) return;
  const message = "several sequences can't be streamed: the best one is known only at the end";
  const hint = 'use numBeams: 1 and numReturnSequences: 1, or call caption, generate or ask';
  throw new VlmportError('OptionError', 'option.contradiction', message, hint);
}

/** Throws OptionError unless a value is true or false. */
export function checkFlag(name: string, value: boolean): void {
  if (typeof value === 'boolean') return;
  const message = `${name}=${quoted(value)}, expected true or false`;
  const hint = `for example ${name}: false`;
  throw new VlmportError('OptionError', 'option.wrong-value', message, hint);
}

/** Throws OptionError unless a value is a whole number of at least `least`. */
export function checkCount(name: string, value: number, least = 1): void {
  if (Number.isInteger(value) && value >= least) return;
  const message = `${name}=${quoted(value)}, expected a whole number of at least ${least}`;
  throw new VlmportError('OptionError', 'option.wrong-value', message, `for example ${name}: 2`);
}

/** Throws OptionError for an unknown option. */
export function checkNames(options: object, known: readonly string[]): void {
  const unknown = Object.keys(options).filter(name => !known.includes(name));
  if (unknown.length) throw unknownOption(unknown, known);
}
