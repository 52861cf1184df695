/**
 * Greedy decoding and sampling, and what every search has in common (the twin of
 * vlmport/runtime/decoding/search.py).
 *
 * A search chooses the tokens of one request. It is a pure function of the logits and of its
 * earlier choices: it knows nothing of graphs, caches or other requests. The caller runs the
 * decoder and passes the logits in; the search says which token each row continues with, and which
 * row of the cache it continues.
 */

import { VlmportError } from '../../errors.js';
import type { GenerationOptions } from './options.js';
import type { Processors } from './processors.js';
import { type State, draw, stream } from './rng.js';
import { argmax, best, highest } from './score-rows.js';

export type StopReason = 'stop' | 'length' | 'stop_string';

/**
 * Whether a row's new tokens contain a stop string, asked after each token. A pure function: beams
 * ask about continuations that they drop afterwards.
 */
export type IsStopped = (tokens: readonly number[]) => boolean;

/** The tokens to run next. */
export interface Choice {
  /** The next token of each row that goes on; finished rows are left out. */
  readonly tokens: readonly number[];
  /** For each token, the row of the last call (0 after the prompt) that it continues. */
  readonly parents: readonly number[];
}

/** A token's log-probability by the raw logits, and the most likely tokens at its place. */
export interface TokenLogprob {
  readonly token: number;
  readonly logprob: number;
  /** [token, log-probability], best first; as many as options.logprobs asks for. */
  readonly top: readonly (readonly [number, number])[];
}

/** One answer. */
export interface Hypothesis {
  /** The new tokens, the stop token included. */
  readonly tokens: readonly number[];
  /** Null if the answer could go on, because the search was interrupted. */
  readonly stopReason: StopReason | null;
  /** For beam search, the sum of the log-probabilities over length ** lengthPenalty; else null. */
  readonly score: number | null;
  /** One for each token if options.logprobs is given, else null. */
  readonly logprobs: readonly TokenLogprob[] | null;
}

/** The decoding of one request. */
export interface Search {
  /** The maximum number of rows; the cache is sized by it. */
  readonly rows: number;
  /** The seed of the random stream, even if none was given; null without sampling. */
  readonly seed: number | null;
  /** The number of choices so far. */
  readonly steps: number;
  /** Whether nothing is left to choose. */
  readonly done: boolean;
  /**
   * Choose one more token for each row.
   *
   * `logits` has one row for each token of the last choice, in its order; the first time, one row
   * for the prompt. They are never written to and never kept. Throws DeviceError for logits that
   * are not finite, OptionError where the options leave no token to choose.
   */
  choose(logits: readonly Float32Array[]): Choice;
  /**
   * Return the answers, best first, finished or not; none before the first choice. There are
   * numReturnSequences answers, or fewer where beam search finds no more.
   */
  results(): Hypothesis[];
}

/** Decides when an answer ends. */
export class StopCondition {
  constructor(
    readonly stopTokenIds: ReadonlySet<number>,
    readonly maxNewTokens: number,
    private readonly isStopped: IsStopped | null,
  ) {}

  /** Return why an answer ends with the last of these tokens; null if it goes on. */
  reason(tokens: readonly number[]): StopReason | null {
    if (tokens.length && this.stopTokenIds.has(tokens.at(-1)!)) return 'stop';
    if (tokens.length && this.isStopped?.(tokens)) return 'stop_string';
    return tokens.length >= this.maxNewTokens ? 'length' : null;
  }
}

/** Reports log-probabilities, if `count` (options.logprobs) asks for them. */
export class LogprobReporter {
  constructor(private readonly count: number | null) {}

  /** Return the reports of an answer; null if there are none. */
  all(reported: readonly TokenLogprob[]): readonly TokenLogprob[] | null {
    return this.count === null ? null : reported;
  }

  /** Report the log-probability of each of these tokens by one row of raw logits. */
  report(logits: Float32Array, tokens: readonly number[]): TokenLogprob[] {
    if (this.count === null) return [];
    const top = highest(logits);
    let sum = 0;
    for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - top);
    const total = Math.log(sum);
    const logprob = (token: number) => Math.fround(logits[token]! - top - total);
    const ids = this.count ? best(logits, Math.min(this.count, logits.length)) : [];
    const likeliest = ids.map(token => [token, logprob(token)] as const);
    return tokens.map(token => ({ token, logprob: logprob(token), top: likeliest }));
  }
}

/**
 * Throw DeviceError for rows whose best logit is not finite: the decoder is at fault.
 *
 * `tops` has the best token of each row, by `argmax`; NaN is the best of its row. `place` is the
 * number of tokens before this one, for the message.
 */
export function checkLogits(
  logits: readonly Float32Array[],
  tops: readonly number[],
  place: number,
): void {
  if (tops.every((top, row) => Number.isFinite(logits[row]![top]))) return;
  const message = `the decoder's scores are NaN or infinite at token ${place}`;
  const hint = 'try another device or precision';
  throw new VlmportError('DeviceError', 'device.not-finite', message, hint);
}

/** Make the error for scores that leave no token to choose. */
export function nothingLeft(place: number): VlmportError {
  const message = `the options leave no token to choose at token ${place}`;
  const hint =
    'leave out one of the options that forbid tokens (badWordsIds, suppressTokens, ' +
    'noRepeatNgramSize, minNewTokens)';
  return new VlmportError('OptionError', 'option.no-token-left', message, hint);
}

interface Sequence {
  readonly tokens: readonly number[];
  readonly logprobs: readonly TokenLogprob[];
  readonly stopReason: StopReason | null;
  readonly stream: State | null;
}

/** Greedy decoding, or several sequences that are sampled independently of each other. */
export class IndependentSearch implements Search {
  readonly rows: number;
  steps = 0;
  private readonly reporter: LogprobReporter;
  private readonly checks: boolean;
  private readonly scores: Float32Array<ArrayBuffer>; // the buffer that processors write to
  private sequences: readonly Sequence[];
  private going: readonly number[]; // indices of the sequences of the last choice's rows

  constructor(
    options: GenerationOptions,
    private readonly processors: Processors,
    private readonly stopCondition: StopCondition,
    readonly seed: number | null,
    vocabSize: number,
  ) {
    this.rows = options.numReturnSequences;
    this.reporter = new LogprobReporter(options.logprobs);
    this.checks = !options.removeInvalidValues;
    this.scores = new Float32Array(vocabSize);
    this.going = Array.from({ length: this.rows }, (_, n) => n);
    this.sequences = this.going.map(n => ({
      tokens: [],
      logprobs: [],
      stopReason: null,
      stream: seed === null ? null : stream(seed, n),
    }));
  }

  get done(): boolean {
    return !this.going.length;
  }

  choose(logits: readonly Float32Array[]): Choice {
    const tops = logits.map(argmax);
    if (this.checks) checkLogits(logits, tops, this.steps);
    const sequences = [...this.sequences];
    const [going, tokens, parents]: [number[], number[], number[]] = [[], [], []];
    this.going.forEach((n, place) => {
      const row = this.steps ? place : 0; // all continue the one row of the prompt
      const sequence = this.extended(sequences[n]!, logits[row]!, tops[row]!);
      sequences[n] = sequence;
      if (sequence.stopReason !== null) return;
      going.push(n);
      tokens.push(sequence.tokens.at(-1)!);
      parents.push(row);
    });
    [this.sequences, this.going] = [sequences, going];
    this.steps++;
    return { tokens, parents };
  }

  /** Return the sequence with one more token; `token` is the best by the logits alone. */
  private extended(sequence: Sequence, logits: Float32Array, token: number): Sequence {
    let scores = logits;
    if (this.processors.inOrder.length) {
      this.scores.set(logits);
      scores = this.processors.process(this.scores, sequence.tokens);
      token = argmax(scores);
      if (!Number.isFinite(scores[token])) throw nothingLeft(sequence.tokens.length);
    }
    let { stream } = sequence;
    if (stream !== null) [token, stream] = draw(scores, stream);
    const tokens = [...sequence.tokens, token];
    const logprobs = [...sequence.logprobs, ...this.reporter.report(logits, [token])];
    return { tokens, logprobs, stopReason: this.stopCondition.reason(tokens), stream };
  }

  results(): Hypothesis[] {
    return this.sequences
      .filter(one => one.tokens.length)
      .map(({ tokens, stopReason, logprobs }) => ({
        tokens,
        stopReason,
        score: null,
        logprobs: this.reporter.all(logprobs),
      }));
  }
}
