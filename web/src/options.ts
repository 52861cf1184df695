/** Options of calls: their types, and the checks that refuse what is not known. */

import type { ImageOptions } from './bundle/manifest.js';
import { VlmportError, cut, didYouMean, quoted } from './errors.js';
import type { PictureSource } from './picture.js';

export type { ImageOptions };

export interface AnswerOptions {
  /** Maximum number of new tokens; the bundle's default without it. */
  maxNewTokens?: number;
  /**
   * Leave special tokens out of the text (default true). With false it is what transformers'
   * `decode(ids, skip_special_tokens=False)` gives, the stop token included.
   */
  skipSpecialTokens?: boolean;
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

const ANSWER_OPTIONS = ['maxNewTokens', 'skipSpecialTokens', 'signal'];

/** Throws OptionError for what is neither one of AnswerOptions nor one of `more`. */
export function checkAnswerOptions(options: AnswerOptions, more: readonly string[] = []): void {
  checkNames(options, [...ANSWER_OPTIONS, ...more]);
  const { maxNewTokens, skipSpecialTokens } = options;
  if (maxNewTokens !== undefined) checkCount('maxNewTokens', maxNewTokens);
  if (skipSpecialTokens !== undefined) checkFlag('skipSpecialTokens', skipSpecialTokens);
}

/** Throws OptionError for what is neither true nor false. */
export function checkFlag(name: string, value: boolean): void {
  if (typeof value === 'boolean') return;
  const message = `${name}=${quoted(value)}, expected true or false`;
  throw new VlmportError(
    'OptionError',
    'option.wrong-value',
    message,
    `for example ${name}: false`,
  );
}

/** Throws OptionError for what is no whole number from `least` on. */
export function checkCount(name: string, value: number, least = 1): void {
  if (Number.isInteger(value) && value >= least) return;
  const message = `${name}=${quoted(value)}, expected a whole number of at least ${least}`;
  throw new VlmportError('OptionError', 'option.wrong-value', message, `for example ${name}: 2`);
}

/** Names of other programs, in small letters and without underscores → names here. */
const SAME: Readonly<Record<string, string>> = {
  maxtokens: 'maxNewTokens',
  maxcompletiontokens: 'maxNewTokens',
  maxoutputtokens: 'maxNewTokens',
  maxlength: 'maxNewTokens',
  maxnewtokens: 'maxNewTokens',
  npredict: 'maxNewTokens',
  numpredict: 'maxNewTokens',
  skipspecialtokens: 'skipSpecialTokens',
  abortsignal: 'signal',
  imageoptions: 'imageOptions',
  dropoldest: 'dropOldest',
  systemprompt: 'system',
};
// Options of how tokens are chosen.
const PYTHON =
  /^(do_?sample|temperature|(top|min|typical)_?[kp]|num_?beams|seed|n|stop(_?strings)?|logit_?bias|logprobs|(num_?return_?sequences)|(\w+_?penalty)|json_?schema|regex|response_?format)$/i;

/** Unknown options are refused, not ignored. */
export function checkNames(options: object, known: readonly string[]): void {
  const unknown = Object.keys(options).find(name => !known.includes(name));
  if (unknown === undefined) return;
  const here = SAME[unknown.replaceAll('_', '').toLowerCase()];
  const isKnown = here !== undefined && known.includes(here);
  const near = isKnown ? ` (did you mean '${here}'?)` : didYouMean(unknown, known);
  const hint = PYTHON.test(unknown)
    ? 'this package decodes greedily; the Python package has other ways'
    : `known: ${known.join(', ')}`;
  const message = `unknown option '${cut(unknown)}'${near}`;
  throw new VlmportError('OptionError', 'option.unknown', message, hint);
}
