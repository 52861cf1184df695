/**
 * `GenerationOptions`: how tokens are chosen, and when an answer ends (the twin of
 * vlmport/runtime/decoding/options.py).
 *
 * Names, meanings and defaults are those of Hugging Face's `generate`, in camel case. Where it
 * warns, this throws. docs/decoding.md has the table. The options are plain data, which the page
 * checks and sends to the worker.
 */

import { VlmportError, cut, didYouMean, firstLine, quoted } from '../../errors.js';
import { REFUSED, camelCase, instead, nameHere, snakeCase } from './foreign-options.js';
import * as values from './option-values.js';
import { newSeed } from './rng.js';

/** Options of one generation, each with its value. `DecodingOptions` says what each does. */
export type GenerationOptions = {
  readonly [name in keyof typeof DEFAULTS]: (typeof DEFAULTS)[name];
};

const list = <T>(): readonly T[] => [];
const none = <T>(): T | null => null;

export const DEFAULTS = {
  maxNewTokens: none<number>(),
  minNewTokens: 0 as number,
  maxLength: none<number>(),
  minLength: 0 as number,
  stopStrings: list<string>(),
  doSample: false as boolean,
  numBeams: 1 as number,
  numReturnSequences: 1 as number,
  seed: none<number>(),
  earlyStopping: false as boolean | 'never',
  lengthPenalty: 1 as number,
  sequenceBias: list<readonly [values.TokenIds, number]>(),
  encoderRepetitionPenalty: 1 as number,
  repetitionPenalty: 1 as number,
  presencePenalty: 0 as number,
  frequencyPenalty: 0 as number,
  noRepeatNgramSize: 0 as number,
  encoderNoRepeatNgramSize: 0 as number,
  badWordsIds: list<values.TokenIds>(),
  forcedEosTokenId: list<number>(),
  removeInvalidValues: false as boolean,
  exponentialDecayLengthPenalty: none<readonly [number, number]>(),
  suppressTokens: list<number>(),
  beginSuppressTokens: list<number>(),
  temperature: 1 as number,
  topH: none<number>(),
  topK: 50 as number,
  topP: 1 as number,
  minP: none<number>(),
  typicalP: 1 as number,
  epsilonCutoff: 0 as number,
  etaCutoff: 0 as number,
  renormalizeLogits: false as boolean,
  logprobs: none<number>(),
  promptLookupNumTokens: none<number>(),
  maxMatchingNgramSize: 2 as number,
  skipSpecialTokens: true as boolean,
};

type Name = keyof GenerationOptions;
type Given = Readonly<Record<string, unknown>>;

/** The options of generation_config.json, whose names are in snake case. */
export type Defaults = Readonly<Record<string, unknown>>;

const NOTHING: GenerationOptions = { ...DEFAULTS, topK: 0 }; // null does nothing: not the default

// Options that mean something only when tokens are drawn, and only with several beams.
const SAMPLING: readonly Name[] = [
  'temperature',
  'topH',
  'topK',
  'topP',
  'minP',
  'typicalP',
  'epsilonCutoff',
  'etaCutoff',
  'seed',
];
const BEAMS: readonly Name[] = ['earlyStopping', 'lengthPenalty'];

const positive = values.numberIn('a number above 0', 1.2, n => n > 1e-30 && n < 1e30);
const part = values.numberIn('a number above 0 and at most 1', 0.9, n => n > 0 && n <= 1);
const subtracted = values.numberIn('a number from -2 to 2', 0.5, n => n >= -2 && n <= 2);
const cutoff = values.numberIn('a number from 0 to below 1', 3e-4, n => n >= 0 && n < 1);

const CHECKS: { readonly [name in Name]: values.Check<GenerationOptions[name]> } = {
  maxNewTokens: values.atLeast(1),
  minNewTokens: values.atLeast(0),
  maxLength: values.atLeast(1),
  minLength: values.atLeast(0),
  stopStrings: values.strings,
  doSample: values.flag,
  numBeams: values.atLeast(1, 65),
  numReturnSequences: values.atLeast(1, 65),
  seed: values.atLeast(0, 2 ** 32),
  earlyStopping: values.flagOrNever,
  lengthPenalty: values.numberIn('a number from -5 to 5', 1, n => n >= -5 && n <= 5),
  sequenceBias: values.sequenceBias,
  encoderRepetitionPenalty: positive,
  repetitionPenalty: positive,
  presencePenalty: subtracted,
  frequencyPenalty: subtracted,
  noRepeatNgramSize: values.atLeast(0),
  encoderNoRepeatNgramSize: values.atLeast(0),
  badWordsIds: values.tokenSequences,
  forcedEosTokenId: values.tokenIds,
  removeInvalidValues: values.flag,
  exponentialDecayLengthPenalty: values.decay,
  suppressTokens: values.tokenIds,
  beginSuppressTokens: values.tokenIds,
  temperature: values.temperature,
  topH: part,
  topK: values.atLeast(0),
  topP: part,
  minP: values.numberIn('a number from 0 to 1', 0.05, n => n >= 0 && n <= 1),
  typicalP: part,
  epsilonCutoff: cutoff,
  etaCutoff: cutoff,
  renormalizeLogits: values.flag,
  logprobs: values.atLeast(0),
  promptLookupNumTokens: values.atLeast(1),
  maxMatchingNgramSize: values.atLeast(1),
  skipSpecialTokens: values.flag,
};

/** The names of all options. */
export const NAMES: readonly string[] = Object.keys(CHECKS);

const isName = (name: string): name is Name => Object.hasOwn(CHECKS, name);

/** Make options of a call's. Throws OptionError for unknown names and values out of range. */
export function optionsOf(given: Given): GenerationOptions {
  const options = { ...DEFAULTS, ...normalized(withoutRefused(given)) };
  refuseContradictions(options);
  return options;
}

/** A default that is left out, because it can't be served. */
export type OnLeftOut = (message: string) => void;

/**
 * Merge the options of a call with the defaults of generation_config.json, whose names are in snake
 * case.
 *
 * The call's options count first. Defaults that have no meaning with them are dropped (a
 * temperature where the call says doSample: false), and so are names that are no options. An option
 * given as null is the value that does nothing, whatever the default. A default that is not
 * supported is left out, and `onLeftOut` is told: the call did not ask for it.
 *
 * `others` are the names of the call's other options, for errors.
 *
 * `checkDefault` is called with the name and value of a default; it throws OptionError where the
 * model does not support it. Throws OptionError as `optionsOf` does.
 */
export function merged(
  defaults: Defaults,
  given: Given,
  checkDefault: (name: Name, value: unknown) => void = () => {},
  onLeftOut: OnLeftOut = () => {},
  others: readonly string[] = [],
): GenerationOptions {
  const wanted = normalized(withoutRefused(given, others));
  const asked: Record<string, unknown> = {};
  const wrong = new Map<string, string>();
  for (const [python, value] of Object.entries(defaults)) {
    const name = camelCase(python);
    if (python !== snakeCase(name) || (!isName(name) && !Object.hasOwn(REFUSED, python))) continue;
    try {
      refuse(python, python, value);
      if (!isName(name)) continue;
      asked[name] = normalize(name, value, python);
      if (!Object.hasOwn(wanted, name)) checkDefault(name, asked[name]);
    } catch (error) {
      if (!(error instanceof VlmportError)) throw error;
      delete asked[name];
      wrong.set(name, firstLine(error));
    }
  }
  const dropped = new Set([...Object.keys(given).map(camelCase), ...ignored(asked, wanted)]);
  for (const [name, message] of [...wrong].sort()) {
    if (!dropped.has(name)) onLeftOut(`generation_config.json: ${message}; left out`);
  }
  const kept = Object.entries(asked).filter(([name]) => !dropped.has(name));
  const options: GenerationOptions = { ...DEFAULTS, ...Object.fromEntries(kept), ...wanted };
  const isAsked = Object.hasOwn(wanted, 'doSample') && Object.hasOwn(wanted, 'numBeams');
  const needsSeed = options.doSample && options.numBeams > 1 && !isAsked;
  const seeded = needsSeed && !('seed' in wanted) && options.seed === null;
  const all = seeded ? { ...options, seed: newSeed() } : options;
  refuseContradictions(all);
  return all;
}

/** Return maxNewTokens, or what maxLength leaves after the prompt; null is no limit. */
export function maxNewTokensAfter(options: GenerationOptions, promptTokens: number): number | null {
  const { maxNewTokens, maxLength } = options;
  if (maxNewTokens !== null || maxLength === null) return maxNewTokens;
  return Math.max(maxLength - promptTokens, 0);
}

/** Return minNewTokens, or what minLength asks for after the prompt. */
export function minNewTokensAfter(options: GenerationOptions, promptTokens: number): number {
  return options.minNewTokens || Math.max(options.minLength - promptTokens, 0);
}

/**
 * Select the options of a call that are given. Throws OptionError for unknown names, and for what
 * is refused.
 */
function withoutRefused(given: Given, others: readonly string[] = []): Given {
  const entries = Object.entries(given).filter(([, value]) => value !== undefined);
  const isRefused = (name: string) => Object.hasOwn(REFUSED, snakeCase(name));
  const unknown = entries.map(([name]) => name).filter(name => !isName(name) && !isRefused(name));
  if (unknown.length) throw unknownOption(unknown, [...NAMES, ...others]);
  for (const [name, value] of entries) refuse(snakeCase(name), name, value);
  return Object.fromEntries(entries.filter(([name]) => isName(name)));
}

/** Make the error for names that are no options; `known` are those of the call. */
export function unknownOption(unknown: readonly string[], known: readonly string[]): VlmportError {
  const near = (name: string) => {
    const here = nameHere(name);
    if (here !== null && known.includes(here)) return ` (did you mean '${here}'?)`;
    return instead(name) === null ? didYouMean(name, known) : '';
  };
  const named = unknown.slice(0, 8).map(name => `'${cut(name)}'${near(name)}`);
  const hint = unknown.map(instead).find(one => one !== null);
  const listed = unknown.every(near)
    ? "the documentation's page on decoding describes the options"
    : `known: ${known.join(', ')}`;
  const message = `unknown option ${named.join(', ')}`;
  return new VlmportError('OptionError', 'option.unknown', message, hint ?? listed);
}

/** Throws OptionError for an option of Hugging Face's that is not supported. */
function refuse(python: string, name: string, value: unknown): void {
  if (!Object.hasOwn(REFUSED, python)) return;
  const [neutral, hint] = REFUSED[python]!;
  if (neutral.includes(value)) return;
  const message = `option ${name}=${quoted(value)} is not supported`;
  throw new VlmportError('OptionError', 'option.unsupported', message, hint);
}

function normalized(given: Given): Partial<GenerationOptions> {
  const pairs = Object.entries(given).map(([name, value]) => [
    name,
    normalize(name as Name, value),
  ]);
  return Object.fromEntries(pairs) as Partial<GenerationOptions>;
}

/** Check and normalize a value. Null is the value that does nothing. */
function normalize(name: Name, value: unknown, shown: string = name): unknown {
  return value === null ? NOTHING[name] : CHECKS[name](shown, value);
}

/** List the defaults that have no effect with the call's options and the other defaults. */
function ignored(asked: Given, wanted: Given): Set<string> {
  const both: GenerationOptions = { ...DEFAULTS, ...asked, ...wanted };
  const isWanted = (...names: Name[]) => names.some(name => Object.hasOwn(wanted, name));
  const dropped = new Set<Name>(['maxLength']); // the bundle's maxNewTokens replaces it
  const drop = (holds: boolean, ...names: readonly Name[]) =>
    holds && names.forEach(name => dropped.add(name));
  const { doSample, numBeams, numReturnSequences, forcedEosTokenId, maxNewTokens } = both;
  drop(!doSample, ...SAMPLING);
  drop(numBeams === 1, ...BEAMS);
  drop(numReturnSequences > numBeams && !(doSample && numBeams === 1), 'numReturnSequences');
  drop(numBeams > 1 || numReturnSequences > 1, 'promptLookupNumTokens');
  drop(isWanted('maxNewTokens', 'maxLength'), 'maxNewTokens', 'minNewTokens', 'minLength');
  const hasMinimum = isWanted('minNewTokens', 'minLength') || Object.hasOwn(asked, 'minNewTokens');
  drop(hasMinimum, 'minLength');
  const isMore = maxNewTokens !== null && both.minNewTokens > maxNewTokens;
  drop(isWanted('minLength') || isMore, 'minNewTokens');
  const isSuppressed = forcedEosTokenId.every(one => both.suppressTokens.includes(one));
  drop(
    forcedEosTokenId.length > 0 && isSuppressed,
    isWanted('forcedEosTokenId') ? 'suppressTokens' : 'forcedEosTokenId',
  );
  return dropped;
}

/** Throws OptionError for the first options that contradict each other. */
function refuseContradictions(options: GenerationOptions): void {
  const found = contradictions(options).find(([holds]) => holds);
  if (found) throw new VlmportError('OptionError', 'option.contradiction', found[1], found[2]);
}

/** List the contradictions: whether each is there, its message, and its hint. */
function contradictions(o: GenerationOptions): [boolean, string, string][] {
  const [most, least, forced] = [o.maxNewTokens, o.minNewTokens, o.forcedEosTokenId];
  const [drawing, ofBeams] = [setOptions(o, SAMPLING), setOptions(o, BEAMS)];
  const several = o.numBeams > 1 || o.numReturnSequences > 1;
  return [
    [
      most !== null && least > most,
      `minNewTokens=${least} is more than maxNewTokens=${most}`,
      'raise one or lower the other',
    ],
    [
      o.maxLength !== null && o.minLength > o.maxLength,
      `minLength=${o.minLength} is more than maxLength=${o.maxLength}`,
      'raise one or lower the other',
    ],
    [
      most !== null && o.maxLength !== null,
      `maxNewTokens=${most} and maxLength=${o.maxLength}`,
      'give one of them; maxLength counts the prompt too',
    ],
    [
      least > 0 && o.minLength > 0,
      `minNewTokens=${least} and minLength=${o.minLength}`,
      'give one of them; minLength counts the prompt too',
    ],
    [
      !o.doSample && drawing.length > 0,
      `${drawing.join(' and ')} without doSample=true`,
      `add doSample: true, or leave out ${drawing.join(' and ')}: only sampling uses it`,
    ],
    [
      o.numBeams === 1 && ofBeams.length > 0,
      `${ofBeams.join(' and ')} without beams`,
      'give numBeams: 2 or more too, or leave it out',
    ],
    [
      o.numReturnSequences > o.numBeams && !(o.doSample && o.numBeams === 1),
      `numReturnSequences=${o.numReturnSequences} is more than numBeams=${o.numBeams}`,
      'raise numBeams, or sample with doSample: true and without beams',
    ],
    [
      o.doSample && o.numBeams > 1 && o.seed === null,
      `numBeams=${o.numBeams} with doSample=true, without a seed`,
      'give seed: 0 or another, or doSample: false: then beams find the likeliest text',
    ],
    [
      forced.length > 0 && forced.every(one => o.suppressTokens.includes(one)),
      `forcedEosTokenId=${quoted(forced)} is in suppressTokens`,
      'take it out of one of them; minNewTokens keeps a text from ending early',
    ],
    [
      o.promptLookupNumTokens !== null && several,
      'promptLookupNumTokens with several sequences',
      'leave it out, or numBeams and numReturnSequences',
    ],
  ];
}

/** List the names whose option is set to something other than its default. */
function setOptions(options: GenerationOptions, names: readonly Name[]): Name[] {
  return names.filter(name => options[name] !== DEFAULTS[name] && options[name] !== NOTHING[name]);
}
