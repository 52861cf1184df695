/** The options of calls: their types, and checks that refuse unknown ones. */

import type { ImageOptions } from './bundle/manifest.js';
import { VlmportError, cut, didYouMean, quoted } from './errors.js';
import type { ImageSource } from './image-source.js';

export type { ImageOptions };

export interface AnswerOptions {
  /** Maximum number of new tokens (default: the bundle's). */
  maxNewTokens?: number;
  /**
   * Leave special tokens out of the text (default true). With false the text is that of
   * transformers' `decode(ids, skip_special_tokens=False)`, the stop token included.
   */
  skipSpecialTokens?: boolean;
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

const ANSWER_OPTIONS = ['maxNewTokens', 'skipSpecialTokens', 'signal'];

/** Check the options of an answer, and that there are no others than those and `more`. Throws
 * OptionError. */
export function checkAnswerOptions(options: AnswerOptions, more: readonly string[] = []): void {
  checkNames(options, [...ANSWER_OPTIONS, ...more]);
  const { maxNewTokens, skipSpecialTokens } = options;
  if (maxNewTokens !== undefined) checkCount('maxNewTokens', maxNewTokens);
  if (skipSpecialTokens !== undefined) checkFlag('skipSpecialTokens', skipSpecialTokens);
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

/** Names in other programs, in lower case and without underscores → names here. */
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
// Decoding options that the Python package has.
const PYTHON =
  /^(do_?sample|temperature|(top|min|typical)_?[kp]|num_?beams|seed|n|stop(_?strings)?|logit_?bias|logprobs|(num_?return_?sequences)|(\w+_?penalty)|json_?schema|regex|response_?format)$/i;

/** Throws OptionError for an unknown option. */
export function checkNames(options: object, known: readonly string[]): void {
  const unknown = Object.keys(options).find(name => !known.includes(name));
  if (unknown === undefined) return;
  const here = SAME[unknown.replaceAll('_', '').toLowerCase()];
  const isKnown = here !== undefined && known.includes(here);
  const near = isKnown ? ` (did you mean '${here}'?)` : didYouMean(unknown, known);
  const hint = PYTHON.test(unknown)
    ? 'this package decodes greedily; the Python package has this option'
    : `known: ${known.join(', ')}`;
  const message = `unknown option '${cut(unknown)}'${near}`;
  throw new VlmportError('OptionError', 'option.unknown', message, hint);
}
