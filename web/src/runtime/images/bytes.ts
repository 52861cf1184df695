/** Read bytes as numbers and as text. */

export type Bytes = Uint8Array<ArrayBuffer>;

export const viewOf = (bytes: Bytes) =>
  new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

export const latin = (bytes: Bytes) => new TextDecoder('latin1').decode(bytes);

/** Convert up to `length` bytes to characters of the same numbers. */
export function text(bytes: Bytes, at: number, length: number): string {
  return String.fromCharCode(...bytes.subarray(at, at + Math.max(0, length)));
}

export function fromHex(digits: string): Bytes {
  const pairs = digits.match(/[0-9a-f]{2}/gi) ?? [];
  return Uint8Array.from(pairs, pair => parseInt(pair, 16));
}
