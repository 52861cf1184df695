/**
 * Convert tokens to text piece by piece, never half a character (the twin of
 * vlmport/runtime/streamed_text.py).
 *
 * A piece is the difference between two decodes of a short window of tokens that begins at a clean
 * boundary. So leading spaces that a decoder strips at the start of a text are stripped once only.
 */

const REPLACEMENT = '\ufffd';
const BYTE_TOKEN = /^<0x[0-9A-Fa-f]{2}>$/; // byte fallback: a token for one byte

/** The part of a tokenizer that is used here. */
export interface Decoder {
  decode(tokens: number[], options: { skip_special_tokens: boolean }): string;
  id_to_token(id: number): string | undefined;
}

/**
 * Decode tokens. Ids past the vocabulary have no text: some embeddings have more rows than tokens.
 */
export function decoded(tokenizer: Decoder, tokens: readonly number[], skip: boolean): string {
  const known = tokens.filter(token => tokenizer.id_to_token(token) !== undefined);
  return known.length ? tokenizer.decode(known, { skip_special_tokens: skip }) : '';
}

export class TextStream {
  readonly tokens: number[] = [];
  private start = 0; // the start of the window
  private read = 0; // the text of the tokens before this was given out
  private inBytes = false; // the last tokens are bytes, perhaps of one character

  constructor(
    private readonly tokenizer: Decoder,
    private readonly skipsSpecial = true,
  ) {}

  /** Add a token, and return the text that is certain now; '' while a character is incomplete. */
  push(token: number): string {
    this.tokens.push(token);
    const isByte = BYTE_TOKEN.test(this.tokenizer.id_to_token(token) ?? '');
    this.inBytes = isByte || (this.inBytes && this.decode([token]) === '');
    if (this.inBytes) return '';
    const [given, text] = this.window();
    if (text.length <= given.length || text.endsWith(REPLACEMENT)) return '';
    [this.start, this.read] = [this.read, this.tokens.length];
    return text.slice(given.length);
  }

  /** The text that is not certain yet; incomplete characters as the decoder writes them. */
  get pending(): string {
    const [given, text] = this.window();
    return text.slice(given.length);
  }

  /** Return the rest of the text. */
  finish(): string {
    const rest = this.pending;
    this.start = this.read = this.tokens.length;
    return rest;
  }

  private window(): [string, string] {
    const given = this.tokens.slice(this.start, this.read);
    return [this.decode(given), this.decode(this.tokens.slice(this.start))];
  }

  private decode(tokens: readonly number[]): string {
    return decoded(this.tokenizer, tokens, this.skipsSpecial);
  }
}

/**
 * Ends a text at the first of some strings, wherever tokens begin and end.
 *
 * The tokens of a stop string are part of the ids, as in Hugging Face's `generate`. The text ends
 * before the stop string, and characters that may become one are held back. A stop string may
 * contain the text of special tokens (`<|im_end|>`), even where the text does not. It is searched
 * in the generated text, not in the prompt.
 */
export class StopStrings {
  private readonly reach: number;

  constructor(
    private readonly tokenizer: Decoder,
    private readonly strings: readonly string[],
    private readonly skipsSpecial = true,
  ) {
    // A token may be a single byte; 4 more in front, for decoders that strip a space.
    const bytes = strings.map(one => new TextEncoder().encode(one).length);
    this.reach = Math.max(0, ...bytes) + 4;
  }

  /** Whether the last token completes a stop string. */
  ends(tokens: readonly number[]): boolean {
    const window = tokens.slice(-this.reach);
    const text = this.raw(window);
    const given = withoutHalves(this.raw(window.slice(0, -1)));
    return this.strings.some(
      one => text.indexOf(one, Math.max(0, given.length - one.length + 1)) >= 0,
    );
  }

  /**
   * Count the characters at the end of the text that may become a stop string.
   *
   * If the text `ended` with one, count its characters and those after it in the last token.
   */
  held(tokens: readonly number[], ended = false): number {
    const window = tokens.slice(-this.reach);
    const text = this.raw(window);
    const at = ended ? this.stop(text) : this.beginning(text);
    let inside = window.length;
    for (; inside; inside--) {
      const before = this.raw(window.slice(0, inside));
      if (before.length <= at && text.startsWith(before)) break;
    }
    let given = this.visible(window.slice(0, inside));
    if (inside < window.length && this.visible(window.slice(inside, inside + 1))) {
      given += text.slice(this.raw(window.slice(0, inside)).length, at);
    }
    return this.visible(window).length - given.length;
  }

  /** Return where the first stop string begins; the length if there is none. */
  private stop(text: string): number {
    const found = this.strings.map(one => text.indexOf(one)).filter(at => at >= 0);
    return Math.min(text.length, ...found);
  }

  /** Return where the longest end of the text begins that is the start of a stop string; half a
   * character at the end may become any character. */
  private beginning(text: string): number {
    const whole = withoutHalves(text);
    const longest = Math.min(whole.length, Math.max(0, ...this.strings.map(one => one.length)) - 1);
    for (let size = longest; size > 0; size--) {
      const end = whole.slice(-size);
      if (this.strings.some(one => one.startsWith(end))) return whole.length - size;
    }
    return whole.length;
  }

  private raw(tokens: readonly number[]): string {
    return decoded(this.tokenizer, tokens, false);
  }

  private visible(tokens: readonly number[]): string {
    return decoded(this.tokenizer, tokens, this.skipsSpecial);
  }
}

const withoutHalves = (text: string) => text.replace(/\ufffd+$/, '');
