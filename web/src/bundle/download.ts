/**
 * Download the files of a bundle: check them chunk by chunk, keep them, and resume after an
 * interruption.
 *
 * A file is requested from the first missing byte on. After an interruption it is requested again
 * from there, by byte range. A chunk whose hash is wrong is fetched once more, without any cache.
 */

import { VlmportError, firstLine } from '../errors.js';
import {
  CHUNK_BYTES,
  type FileEntry,
  MANIFEST,
  type Manifest,
  entryOf,
  parseManifest,
} from './manifest.js';
import { sha256 } from './sha256.js';
import type { Store } from './store.js';

const ATTEMPTS = 5; // in a row without a new byte
const FIRST_PAUSE_MS = 300;
const PART_BYTES = 256 * 1024; // of a body, read at a time
const UPLOAD = 'upload all files of the bundle again';
const HEAD_BYTES = 1024; // of a body, by which a web page is recognized
const STALL_MS = 30_000; // without a byte: the connection counts as broken

type Bytes = Uint8Array<ArrayBuffer>;

/** Fetch and validate the manifest. Without a network, the kept one is used. */
export async function openBundle(
  base: URL,
  store: Store,
  signal: AbortSignal,
): Promise<BundleFiles> {
  const url = new URL(MANIFEST, base);
  const kept = await store.getManifest(base);
  let text: string;
  try {
    const response = await fetch(url, { signal, cache: 'no-cache' });
    if (!response.ok) throw badStatus(url, response.status);
    text = await response.text();
    if (isWebPage(text.slice(0, HEAD_BYTES))) throw webPage(url);
  } catch (error) {
    signal.throwIfAborted();
    if (kept !== null) text = kept;
    else if (error instanceof VlmportError) throw error;
    else throw unreachable(url, error);
  }
  const manifest = parseManifest(text, url.href);
  await store.putManifest(base, text);
  return new BundleFiles(base, manifest, store, signal);
}

export class BundleFiles {
  /** Called with the number of bytes that have arrived; negative where some are fetched again. */
  onBytes: (bytes: number) => void = () => {};

  constructor(
    readonly base: URL,
    readonly manifest: Manifest,
    readonly store: Store,
    public signal: AbortSignal, // of the caller that waits for the files now
  ) {}

  size(path: string): number {
    return entryOf(this.manifest, path).size;
  }

  async text(path: string): Promise<string> {
    return new TextDecoder().decode(await this.read(path));
  }

  /** Read a file, and check each chunk. Throws BundleError or DownloadError, or the abort. */
  async read(path: string): Promise<Bytes> {
    const entry = entryOf(this.manifest, path);
    const bytes = new Uint8Array(entry.size);
    const missing: number[] = [];
    for (const [index, hash] of entry.chunks.entries()) {
      this.signal.throwIfAborted();
      const kept = await this.kept(hash, chunkOf(bytes, index).length);
      if (kept === null) missing.push(index);
      else {
        bytes.set(kept, index * CHUNK_BYTES);
        this.onBytes(kept.length);
        freeNow(kept.buffer);
      }
    }
    for (const [start, end] of runsOf(missing)) {
      await new Transfer(this, path, entry, bytes, this.signal).run(start, end);
    }
    return bytes;
  }

  /** Return a chunk from an earlier visit, if its hash is right. */
  private async kept(hash: string, size: number): Promise<Bytes | null> {
    const chunk = await this.store.getChunk(hash);
    if (chunk === null) return null;
    if (chunk.length === size && (await sha256(chunk)) === hash) return chunk;
    await this.store.deleteChunk(hash);
    return null;
  }
}

/** The transfer of consecutive missing chunks of a file. */
class Transfer {
  private position = 0;
  private failures = 0; // since the last byte
  private readonly wrong = new Set<number>(); // chunks whose hash was wrong once
  private readonly chunk: Bytes; // the current one; `bytes` itself is never given to the browser
  private readonly url: URL;

  constructor(
    private readonly files: BundleFiles,
    private readonly path: string,
    private readonly entry: FileEntry,
    private readonly bytes: Bytes,
    private readonly signal: AbortSignal,
  ) {
    this.url = new URL(path, files.base);
    this.chunk = new Uint8Array(Math.min(CHUNK_BYTES, entry.size));
  }

  async run(firstChunk: number, endChunk: number): Promise<void> {
    this.position = firstChunk * CHUNK_BYTES;
    const end = Math.min(endChunk * CHUNK_BYTES, this.entry.size);
    while (this.position < end) {
      const before = this.position;
      try {
        await this.request(end);
        if (this.position < end && this.position === before)
          throw new TypeError('no bytes arrived');
      } catch (error) {
        this.signal.throwIfAborted();
        if (error instanceof VlmportError && error.kind !== 'DownloadError') throw error;
        this.failures = this.position > before ? 1 : this.failures + 1;
        if (this.failures >= ATTEMPTS) throw this.interrupted(error);
        await pause(FIRST_PAUSE_MS * 2 ** (this.failures - 1), this.signal);
      }
    }
  }

  /** Send one request, from the first missing byte on. */
  private async request(end: number): Promise<void> {
    const stall = new AbortController();
    const signal = AbortSignal.any([this.signal, stall.signal]);
    const partial = this.position > 0 || end < this.entry.size;
    const headers = partial ? { range: `bytes=${this.position}-${end - 1}` } : undefined;
    const cache = this.wrong.size ? 'reload' : 'default';
    let timer = setTimeout(() => stall.abort(), STALL_MS);
    try {
      const response = await fetch(this.url, { signal, cache, ...(headers && { headers }) });
      let skip = this.leadingBytes(response); // bytes of the body that are here already
      let start = response.status === 200 || this.position === 0;
      for await (const part of partsOf(response)) {
        clearTimeout(timer);
        timer = setTimeout(() => stall.abort(), STALL_MS);
        if (start && isWebPage(part.subarray(0, HEAD_BYTES))) throw webPage(this.url);
        start = false;
        const fresh = part.subarray(Math.min(skip, part.length));
        skip -= part.length - fresh.length;
        await this.take(fresh.subarray(0, end - this.position));
        if (this.position >= end) break;
      }
    } finally {
      clearTimeout(timer);
      stall.abort(); // ends a body that is too long
    }
  }

  /** Return the number of bytes of the body before the first missing one. */
  private leadingBytes(response: Response): number {
    if (response.status === 200) return this.position; // the server has no byte ranges
    if (response.status !== 206) throw badStatus(this.url, response.status);
    const range = response.headers.get('content-range');
    const [, start, total] = /^bytes (\d+)-\d+(?:\/(\d+))?/.exec(range ?? '') ?? [];
    if (total !== undefined && Number(total) !== this.entry.size) {
      const { headers } = response;
      if (headers.get('content-type')?.startsWith('text/html')) throw webPage(this.url);
      const message = `${this.url}: the server has ${total} bytes, the manifest says ${this.entry.size}`;
      throw new VlmportError('BundleError', 'bundle.other-size', message, UPLOAD);
    }
    if (start === undefined || Number(start) === this.position) return 0;
    const message = `${this.url}: requested byte ${this.position}, got '${range}'`;
    const hint = 'check whether a proxy changes byte ranges';
    throw new VlmportError('DownloadError', 'download.failed', message, hint);
  }

  /** Write bytes to their place; each chunk is checked and kept as soon as it is complete. */
  private async take(part: Uint8Array): Promise<void> {
    let rest = part;
    while (rest.length) {
      const index = Math.floor(this.position / CHUNK_BYTES);
      const chunkEnd = Math.min((index + 1) * CHUNK_BYTES, this.entry.size);
      const now = rest.subarray(0, chunkEnd - this.position);
      this.chunk.set(now, this.position - index * CHUNK_BYTES);
      this.position += now.length;
      this.files.onBytes(now.length);
      rest = rest.subarray(now.length);
      if (this.position === chunkEnd) await this.finish(index);
    }
  }

  private async finish(index: number): Promise<void> {
    const place = chunkOf(this.bytes, index);
    const chunk = this.chunk.subarray(0, place.length);
    const hash = this.entry.chunks[index] ?? '';
    if ((await sha256(chunk)) === hash) {
      place.set(chunk);
      await this.files.store.putChunk(hash, chunk);
      return;
    }
    this.position = index * CHUNK_BYTES;
    this.files.onBytes(-chunk.length);
    const message = `${this.path}: chunk ${index + 1} of ${this.entry.chunks.length} differs from the manifest`;
    if (this.wrong.has(index)) {
      throw new VlmportError('BundleError', 'bundle.not-as-listed', message, UPLOAD);
    }
    this.wrong.add(index);
    throw new VlmportError('DownloadError', 'download.failed', message, 'it is fetched again');
  }

  private interrupted(error: unknown): VlmportError {
    if (error instanceof VlmportError) return error;
    const message = `${this.url}: the download stopped at byte ${this.position} of ${this.entry.size} (${firstLine(error)})`;
    const hint = 'check the connection and load again: the download continues from there';
    return new VlmportError('DownloadError', 'download.failed', message, hint);
  }
}

/**
 * Read a body part by part. All parts use one buffer, so each is valid until the next: with a
 * buffer for each, hundreds of megabytes would wait for the garbage collector while the model is
 * loaded.
 */
async function* partsOf({ body }: Response): AsyncGenerator<Uint8Array, void, undefined> {
  const reader = body && bufferReader(body);
  if (!reader) {
    yield* defaultParts(body);
    return;
  }
  let buffer = new ArrayBuffer(PART_BYTES);
  for (;;) {
    const { done, value } = await reader.read(new Uint8Array(buffer));
    if (value === undefined || done) return;
    yield value;
    buffer = value.buffer;
  }
}

/** Return a reader that fills a given buffer; null where the browser has none for downloads. */
function bufferReader(body: ReadableStream): ReadableStreamBYOBReader | null {
  try {
    return body.getReader({ mode: 'byob' });
  } catch {
    return null;
  }
}

async function* defaultParts(
  body: ReadableStream<Uint8Array> | null,
): AsyncGenerator<Uint8Array, void, undefined> {
  const reader = body?.getReader();
  for (let read = await reader?.read(); read && !read.done; read = await reader?.read()) {
    yield read.value;
  }
}

/**
 * Free a buffer now; the garbage collector may free hundreds of megabytes too late.
 *
 * This works for a buffer that was only used in JavaScript. One that was given to the browser (to
 * be hashed, kept or sent) is freed later. Browsers before 2024 leave it to the garbage collector.
 */
export function freeNow(buffer: ArrayBuffer): void {
  const { transfer } = buffer as Partial<ArrayBuffer>;
  transfer?.call(buffer, 0);
}

function chunkOf(bytes: Bytes, index: number): Bytes {
  return bytes.subarray(index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES);
}

/** Merge consecutive indices into ranges [first, end). */
export function runsOf(indices: readonly number[]): [number, number][] {
  const runs: [number, number][] = [];
  for (const index of indices) {
    const last = runs.at(-1);
    if (last?.[1] === index) last[1] = index + 1;
    else runs.push([index, index + 1]);
  }
  return runs;
}

function badStatus(url: URL, status: number): VlmportError {
  const message = `${url}: the server answered with status ${status}`;
  if (status === 404 || status === 410) {
    const hint = 'check that this is the address of a vlmport bundle';
    return new VlmportError('BundleError', 'bundle.missing-file', message, hint);
  }
  if (status === 416) {
    const shorter = `${url}: shorter than the manifest says`;
    return new VlmportError('BundleError', 'bundle.other-size', shorter, UPLOAD);
  }
  if (status === 401 || status === 403) {
    return new VlmportError(
      'BundleError',
      'download.no-access',
      message,
      'check that the bundle is public',
    );
  }
  const hint = 'try again later: the download continues from there';
  return new VlmportError('DownloadError', 'download.failed', message, hint);
}

/** Whether a body begins like an HTML document. No file of a bundle is one. */
export function isWebPage(head: Uint8Array | string): boolean {
  const text = typeof head === 'string' ? head : new TextDecoder().decode(head);
  return /^\s*(?:<!--[^]{0,500}?-->\s*){0,3}<(?:!doctype\s+html|html|head)\b/i.test(text);
}

/**
 * The error for a web page with status 200, which some servers send for a missing file or a login.
 */
function webPage(url: URL): VlmportError {
  const message = `${url} is a web page, not a file of a bundle`;
  const hint =
    'check the address: some servers send their page for a missing file, and a proxy its login';
  return new VlmportError('BundleError', 'source.web-page', message, hint);
}

function unreachable(url: URL, error: unknown): VlmportError {
  const message = `${url} can't be fetched (${firstLine(error)})`;
  const hint = 'check the connection; a server of another origin has to allow this page (CORS)';
  return new VlmportError('DownloadError', 'download.failed', message, hint);
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener('abort', () => (clearTimeout(timer), reject(signal.reason)), {
      once: true,
    });
  });
}
