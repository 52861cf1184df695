/** Options of calls: their types, and the checks that refuse what is not known. */

import type { ImageOptions } from './bundle/manifest.js';
import { VlmportError, didYouMean } from './errors.js';
import type { PictureSource } from './picture.js';

export type { ImageOptions };

export interface AnswerOptions {
  /** At most so many tokens; the bundle's default without it. */
  maxNewTokens?: number;
  signal?: AbortSignal;
}

export interface CaptionOptions extends AnswerOptions {
  /** Of the image processor, over the bundle's own: `{ do_image_splitting: false }`. */
  imageOptions?: ImageOptions;
}

export interface GenerateOptions extends CaptionOptions {
  /** For the image parts that carry no picture, in order. */
  images?: readonly PictureSource[];
}

const ANSWER_OPTIONS = ['maxNewTokens', 'signal'];

/** Throws OptionError for what is neither one of AnswerOptions nor one of `more`. */
export function checkAnswerOptions(options: AnswerOptions, more: readonly string[] = []): void {
  checkNames(options, [...ANSWER_OPTIONS, ...more]);
  if (options.maxNewTokens !== undefined) checkCount('maxNewTokens', options.maxNewTokens);
}

/** Throws OptionError for what is no whole number from `least` on. */
export function checkCount(name: string, value: number, least = 1): void {
  if (Number.isInteger(value) && value >= least) return;
  const message = `${name}=${value}, expected a whole number of at least ${least}`;
  throw new VlmportError('OptionError', message, `for example ${name}: 2`);
}

/** Unknown options are refused, not ignored. */
export function checkNames(options: object, known: readonly string[]): void {
  const unknown = Object.keys(options).find(name => !known.includes(name));
  if (unknown === undefined) return;
  const message = `unknown option '${unknown}'${didYouMean(unknown, known)}`;
  throw new VlmportError('OptionError', message, `known: ${known.join(', ')}`);
}
