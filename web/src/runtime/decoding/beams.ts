/**
 * Beam search and beam sampling (the twin of vlmport/runtime/decoding/beams.py).
 *
 * Each step computes what Hugging Face's beam search does, with its numbers: all scores are
 * float32, and a penalty of 1e9 marks a candidate as excluded. So the results are equal even where
 * few tokens are allowed. Candidates with equal scores come in the order of their beams, then of
 * their ids.
 */

import type { GenerationOptions } from './options.js';
import type { Processors } from './processors.js';
import { type State, drawSeveral, stream } from './rng.js';
import { argmax, best, highest, logSoftmax } from './score-rows.js';
import {
  type Choice,
  type Hypothesis,
  LogprobReporter,
  type Search,
  type StopCondition,
  type StopReason,
  type TokenLogprob,
  checkLogits,
  nothingLeft,
} from './search.js';

const { fround } = Math;
const EXCLUDED = -1e9; // exact in float32
const LEAST = fround(-1e30); // a lower sum contains a forbidden token

/** A sequence in progress, or a finished one. */
interface Beam {
  readonly tokens: readonly number[];
  /**
   * The sum of its log-probabilities while in progress; when finished, that sum over its length to
   * the power of lengthPenalty.
   */
  readonly score: number;
  /** Whether it only fills up the rows and is never an answer. */
  readonly filler: boolean;
  /** The row of the last call that it continues. */
  readonly row: number;
  readonly stopReason: StopReason | null;
  readonly logprobs: readonly TokenLogprob[];
}

const NOTHING: Beam = {
  tokens: [],
  score: EXCLUDED,
  filler: true,
  row: 0,
  stopReason: null,
  logprobs: [],
};

/** The state between two steps: the beams in progress and the best finished ones, best first. */
interface BeamsState {
  readonly running: readonly Beam[];
  readonly finished: readonly Beam[];
  readonly stream: State | null;
  readonly steps: number;
  readonly done: boolean;
}

/** Beam search over numBeams sequences, or beam sampling with a seed. */
export class BeamSearch implements Search {
  readonly rows: number;
  private readonly reporter: LogprobReporter;
  private readonly candidates: number;
  private state: BeamsState;

  constructor(
    private readonly options: GenerationOptions,
    private readonly processors: Processors,
    private readonly stopCondition: StopCondition,
    readonly seed: number | null,
  ) {
    this.rows = options.numBeams;
    this.reporter = new LogprobReporter(options.logprobs);
    this.candidates = Math.max(2, 1 + stopCondition.stopTokenIds.size) * this.rows;
    const fillers = Array<Beam>(this.rows).fill(NOTHING);
    this.state = {
      // Only the first counts: all start as the same row.
      running: fillers.with(0, { ...NOTHING, score: 0, filler: false }),
      finished: fillers,
      stream: seed === null ? null : stream(seed, 0),
      steps: 0,
      done: false,
    };
  }

  get steps(): number {
    return this.state.steps;
  }

  get done(): boolean {
    return this.state.done;
  }

  choose(logits: readonly Float32Array[]): Choice {
    const before = this.state;
    if (!this.options.removeInvalidValues) {
      checkLogits(logits, logits.map(argmax), before.steps);
    }
    const totals = this.totals(logits);
    if (!(highest(totals) > -Infinity)) return this.exhausted();
    const [candidates, stream] = this.continuations(logits, totals);
    const running = this.nextRunning(candidates);
    const finished = this.bestFinished(candidates);
    const ended = candidates.every(beam => beam.stopReason !== null);
    const done = ended || !this.mayImprove(running, finished);
    this.state = { running, finished, stream, steps: before.steps + 1, done };
    if (done) return { tokens: [], parents: [] };
    return {
      tokens: running.map(beam => beam.tokens.at(-1)!),
      parents: running.map(beam => beam.row),
    };
  }

  /**
   * End the search when no beam can go on. Throws OptionError where no beam has finished.
   */
  private exhausted(): Choice {
    if (!this.state.finished.some(beam => beam.stopReason)) throw nothingLeft(this.state.steps);
    this.state = { ...this.state, steps: this.state.steps + 1, done: true };
    return { tokens: [], parents: [] };
  }

  /** Return the best or sampled continuations of all beams, and the random stream after. */
  private continuations(
    logits: readonly Float32Array[],
    totals: Float32Array,
  ): [Beam[], State | null] {
    const { running, stream } = this.state;
    const count = Math.min(this.candidates, totals.length);
    const [chosen, after] =
      stream === null ? [best(totals, count), null] : drawSeveral(totals, count, stream);
    const width = logits[0]!.length;
    const beams = chosen.map(at => {
      const row = Math.floor(at / width);
      return this.extended(running[row]!, at % width, totals[at]!, row);
    });
    return [this.reported(beams, logits), after];
  }

  /** Compute the score of each beam with each next token, beam by beam. */
  private totals(logits: readonly Float32Array[]): Float32Array {
    const { running } = this.state;
    const width = logits[0]!.length;
    const totals = new Float32Array(running.length * width);
    let row = new Float32Array();
    running.forEach(({ tokens, score }, n) => {
      // The first time there is one row for all beams.
      if (n < logits.length) row = this.processors.process(logSoftmax(logits[n]!), tokens);
      for (let i = 0, at = n * width; i < width; i++, at++) totals[at] = row[i]! + score;
    });
    return totals;
  }

  /** Return a beam with one more token. */
  private extended(beam: Beam, token: number, score: number, row: number): Beam {
    const tokens = [...beam.tokens, token];
    return {
      tokens,
      score,
      filler: beam.filler || !(score > LEAST),
      row: this.state.steps ? row : 0,
      stopReason: this.stopCondition.reason(tokens),
      logprobs: beam.logprobs,
    };
  }

  /** Add the log-probability of each beam's last token, if the options ask for it. */
  private reported(beams: readonly Beam[], logits: readonly Float32Array[]): Beam[] {
    if (this.options.logprobs === null) return [...beams];
    const found = [...beams];
    for (const row of new Set(beams.map(beam => beam.row))) {
      const places = [...beams.keys()].filter(at => beams[at]!.row === row);
      const last = places.map(at => beams[at]!.tokens.at(-1)!);
      this.reporter.report(logits[row]!, last).forEach((report, i) => {
        const beam = beams[places[i]!]!;
        found[places[i]!] = { ...beam, logprobs: [...beam.logprobs, report] };
      });
    }
    return found;
  }

  /** Return the best candidates that did not end, best first. */
  private nextRunning(candidates: readonly Beam[]): Beam[] {
    const hasEnded = (beam: Beam) => beam.stopReason !== null;
    const scores = Float32Array.from(candidates, beam => {
      return hasEnded(beam) ? beam.score + EXCLUDED : beam.score;
    });
    return best(scores, this.rows).map(at => {
      const beam = candidates[at]!;
      return { ...beam, score: scores[at]!, filler: beam.filler || hasEnded(beam) };
    });
  }

  /** Return the best finished beams, with those that ended now among the best candidates. */
  private bestFinished(candidates: readonly Beam[]): Beam[] {
    const length = fround(candidates[0]!.tokens.length ** this.options.lengthPenalty);
    const merged = [...this.state.finished];
    candidates.forEach((beam, place) => {
      const score = fround(beam.score / length);
      const counts = beam.stopReason !== null && place < this.rows;
      const ending = counts ? { score } : { score: fround(score + EXCLUDED), stopReason: null };
      merged.push({ ...beam, ...ending });
    });
    const scores = Float32Array.from(merged, beam => beam.score);
    return best(scores, this.rows).map(at => merged[at]!);
  }

  /** Whether the best beam in progress could still become one of the best answers. */
  private mayImprove(running: readonly Beam[], finished: readonly Beam[]): boolean {
    const { earlyStopping, lengthPenalty } = this.options;
    if (earlyStopping === true && finished.every(beam => beam.stopReason)) return false;
    let { length } = running[0]!.tokens;
    if (earlyStopping === 'never' && lengthPenalty > 0) length = this.stopCondition.maxNewTokens;
    const hope = fround(running[0]!.score / fround(length ** lengthPenalty));
    const worst = Math.min(...finished.map(beam => beam.score));
    return finished.some(beam => hope > (beam.stopReason ? worst : EXCLUDED));
  }

  results(): Hypothesis[] {
    const { running, finished, steps, done } = this.state;
    if (!steps) return [];
    let found = finished.filter(beam => beam.stopReason);
    if (!done || !found.length) {
      const length = fround(steps ** this.options.lengthPenalty);
      const others = running.map(beam => ({ ...beam, score: fround(beam.score / length) }));
      found = [...found, ...others].sort((a, b) => b.score - a.score);
    }
    const real = found.filter(beam => !beam.filler);
    return (real.length ? real : found)
      .slice(0, this.options.numReturnSequences)
      .map(({ tokens, stopReason, score, logprobs }) => ({
        tokens,
        stopReason,
        score,
        logprobs: this.reporter.all(logprobs),
      }));
  }
}
