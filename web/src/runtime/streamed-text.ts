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

  /** Return the whole text. */
  whole(): string {
    return this.decode(this.tokens);
  }

  /** Return the rest, with incomplete characters as the decoder writes them. */
  finish(): string {
    const [given, text] = this.window();
    this.start = this.read = this.tokens.length;
    return text.slice(given.length);
  }

  private window(): [string, string] {
    const given = this.tokens.slice(this.start, this.read);
    return [this.decode(given), this.decode(this.tokens.slice(this.start))];
  }

  /**
   * Decode tokens. Ids past the vocabulary have no text: some embeddings have more rows than
   * tokens.
   */
  decode(tokens: readonly number[]): string {
    const known = tokens.filter(token => this.tokenizer.id_to_token(token) !== undefined);
    return known.length
      ? this.tokenizer.decode(known, { skip_special_tokens: this.skipsSpecial })
      : '';
  }
}
