import type { AnswerData, CaptionData } from './protocol.js';

/** A response; `String(caption)` is its text. */
export class Caption implements CaptionData {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly stopReason: CaptionData['stopReason'];
  readonly complete: boolean;
  readonly score: number | null;
  readonly logprobs: CaptionData['logprobs'];
  readonly seed: number | null;
  readonly alternatives: readonly AnswerData[];
  readonly timings: CaptionData['timings'];
  readonly counts: CaptionData['counts'];

  constructor(data: CaptionData) {
    this.text = data.text;
    this.tokenIds = data.tokenIds;
    this.stopReason = data.stopReason;
    this.complete = data.complete;
    this.score = data.score;
    this.logprobs = data.logprobs;
    this.seed = data.seed;
    this.alternatives = data.alternatives;
    this.timings = data.timings;
    this.counts = data.counts;
  }

  /** Tokens per second. The first token is not counted: its time is that of the prompt. */
  get tokensPerSecond(): number {
    return this.timings.decode > 0 ? (this.counts.newTokens - 1) / this.timings.decode : 0;
  }

  toString(): string {
    return this.text;
  }
}

/** Read a stream to its end, and return the whole response. */
export async function whole(pieces: AsyncGenerator<string, Caption>): Promise<Caption> {
  for (;;) {
    const next = await pieces.next();
    if (next.done) return next.value;
  }
}
