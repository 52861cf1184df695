import { createHash, randomBytes } from 'node:crypto';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { BundleFiles, isWebPage, openBundle, runsOf } from '../src/bundle/download.js';
import { CHUNK_BYTES, type Manifest } from '../src/bundle/manifest.js';
import { sha256, sha256Plain } from '../src/bundle/sha256.js';
import type { Store } from '../src/bundle/store.js';

const digest = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');
const whole = new Uint8Array(randomBytes(2 * CHUNK_BYTES + 12_345)); // two chunks and a bit
const chunks = [0, 1, 2].map(i => whole.subarray(i * CHUNK_BYTES, (i + 1) * CHUNK_BYTES));
const hashes = chunks.map(digest);
const files = { big: { size: whole.length, sha256: digest(whole), chunks: hashes } };

class MemoryStore implements Store {
  readonly problem = null;
  readonly kept = new Map<string, Uint8Array<ArrayBuffer>>();
  getChunk = async (hash: string) => this.kept.get(hash)?.slice() ?? null;
  putChunk = async (hash: string, bytes: Uint8Array<ArrayBuffer>) =>
    void this.kept.set(hash, bytes.slice());
  deleteChunk = async (hash: string) => void this.kept.delete(hash);
  getManifest = async (): Promise<string | null> => null;
  putManifest = async () => {};
}

type Answer = (start: number, end: number) => Response;

const partial: Answer = (start, end) =>
  new Response(whole.slice(start, end), {
    status: 206,
    headers: { 'content-range': `bytes ${start}-${end - 1}/${whole.length}` },
  });

let store: MemoryStore;
let asked: [number, number][];
let answers: Answer[];
let loaded: number;

beforeEach(() => {
  [store, asked, answers, loaded] = [new MemoryStore(), [], [], 0];
  vi.stubGlobal('fetch', async (_: URL, { headers }: { headers?: { range: string } } = {}) => {
    const [, start = 0, last] = /bytes=(\d+)-(\d+)/.exec(headers?.range ?? '') ?? [];
    const span = [Number(start), last ? Number(last) + 1 : whole.length] as [number, number];
    asked.push(span);
    return (answers.shift() ?? partial)(...span);
  });
  const real = setTimeout; // pauses between attempts are skipped, and no connection stalls
  vi.stubGlobal('setTimeout', (work: () => void, ms: number) => (ms < 10_000 ? real(work, 0) : 0));
});
afterEach(() => {
  vi.unstubAllGlobals();
});

function open(signal = new AbortController().signal): BundleFiles {
  const manifest = { files } as unknown as Manifest;
  const bundle = new BundleFiles(new URL('http://host/'), manifest, store, signal);
  bundle.onBytes = count => (loaded += count);
  return bundle;
}

test('a file is fetched in one request, and its chunks are kept', async () => {
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(asked).toEqual([[0, whole.length]]);
  expect([...store.kept.keys()]).toEqual(hashes);
  expect(loaded).toBe(whole.length);
});

test('a browser that cannot read downloads into a given buffer', async () => {
  const body = () => {
    const pieces = [0, 10, CHUNK_BYTES + 7, whole.length];
    return new ReadableStream<Uint8Array>({
      pull: controller => {
        const start = pieces.shift()!;
        if (start < whole.length) controller.enqueue(whole.subarray(start, pieces[0]));
        else controller.close();
      },
    });
  };
  expect(() => body().getReader({ mode: 'byob' })).toThrow(); // it is not a stream of bytes
  answers = [() => new Response(body())];
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(asked).toHaveLength(1);
});

test('only missing chunks are requested', async () => {
  await store.putChunk(hashes[1]!, chunks[1]!);
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(asked).toEqual([
    [0, CHUNK_BYTES],
    [2 * CHUNK_BYTES, whole.length],
  ]);
  expect(loaded).toBe(whole.length);
});

test('a kept chunk that was altered is fetched again', async () => {
  for (const [i, hash] of hashes.entries()) await store.putChunk(hash, chunks[i]!);
  store.kept.get(hashes[0]!)![7]! ^= 1;
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(asked).toEqual([[0, CHUNK_BYTES]]);
  expect(digest(store.kept.get(hashes[0]!)!)).toBe(hashes[0]);
});

test('an interrupted transfer continues from the next byte', async () => {
  const cut = CHUNK_BYTES + 1000;
  answers = [() => partial(0, cut)];
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(asked).toEqual([
    [0, whole.length],
    [cut, whole.length],
  ]);
  expect(loaded).toBe(whole.length);
});

test('a server without ranges sends the whole file, and the present bytes are skipped', async () => {
  await store.putChunk(hashes[0]!, chunks[0]!);
  answers = [() => new Response(whole)];
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(loaded).toBe(whole.length);
});

test('a damaged chunk is fetched again from its start, and no other', async () => {
  const spoiled = whole.slice();
  spoiled[CHUNK_BYTES + 5]! ^= 1;
  answers = [() => new Response(spoiled)];
  expect(digest(await open().read('big'))).toBe(files.big.sha256);
  expect(asked).toEqual([
    [0, whole.length],
    [CHUNK_BYTES, whole.length],
  ]);
  expect(loaded).toBe(whole.length);
});

test('another range than the requested one is refused', async () => {
  await store.putChunk(hashes[0]!, chunks[0]!);
  answers = Array.from({ length: 5 }, () => () => partial(0, 10));
  await expect(open().read('big')).rejects.toMatchObject({
    code: 'download.failed',
    message: expect.stringMatching(/ 8388608, got 'bytes 0-9/),
  });
});

test('a file that is shorter on the server is not requested again', async () => {
  answers = [() => partial(0, 1000), () => new Response(null, { status: 416 })];
  await expect(open().read('big')).rejects.toMatchObject({
    kind: 'BundleError',
    code: 'bundle.other-size',
    message: expect.stringMatching(/^http:\/\/host\/big: /),
  });
  expect(asked).toHaveLength(2);
});

const PAGE = '<!-- app -->\n<!DOCTYPE html><html><body>an app of one page</body></html>';
const html = { 'content-type': 'text/html; charset=utf-8' };
const webPage = { kind: 'BundleError', code: 'source.web-page' };

test('a web page instead of a file, the manifest or a range is refused', async () => {
  answers = [() => new Response(PAGE, { headers: html })];
  await expect(open().read('big')).rejects.toMatchObject(webPage);
  expect(asked).toHaveLength(1); // not again
  await store.putChunk(hashes[0]!, chunks[0]!);
  answers = [
    () => new Response(PAGE), // without ranges and without a type
    () =>
      new Response(PAGE.slice(0, 20), {
        status: 206,
        headers: { ...html, 'content-range': `bytes ${CHUNK_BYTES}-${CHUNK_BYTES + 19}/99999999` },
      }),
    () => new Response(PAGE, { headers: html }),
  ];
  await expect(open().read('big')).rejects.toMatchObject(webPage);
  await expect(open().read('big')).rejects.toMatchObject(webPage);
  const { signal } = new AbortController();
  await expect(openBundle(new URL('http://host/'), store, signal)).rejects.toMatchObject(webPage);
  expect(answers).toEqual([]);
});

test('a login page for each request counts as no network: the kept manifest is used', async () => {
  store.getManifest = async () => '{"version": 99}';
  answers = [() => new Response(PAGE, { headers: html })];
  const { signal } = new AbortController();
  const opened = openBundle(new URL('http://host/'), store, signal);
  await expect(opened).rejects.toMatchObject({ code: 'bundle.newer-version' });
});

test('a file of another size on the server', async () => {
  await store.putChunk(hashes[0]!, chunks[0]!);
  const headers = {
    'content-range': `bytes ${CHUNK_BYTES}-${CHUNK_BYTES + 9}/${CHUNK_BYTES + 10}`,
  };
  answers = [() => new Response(new Uint8Array(10), { status: 206, headers })];
  await expect(open().read('big')).rejects.toMatchObject({ code: 'bundle.other-size' });
});

test('data are not taken for a web page', () => {
  const data = ['', '{}', '<svg>', '<image>', '<heading>', '{"a": "<html>"}', '\x08\n<html>'];
  expect(data.filter(isWebPage)).toEqual([]);
  expect(isWebPage(new TextEncoder().encode('\uFEFF <HTML lang=en>'))).toBe(true);
});

test('an abort while it waits to try again', async () => {
  const controller = new AbortController();
  answers = [() => (controller.abort(), new Response(null, { status: 503 }))];
  await expect(open(controller.signal).read('big')).rejects.toThrow('aborted');
});

test('consecutive chunks are one run', () => {
  expect(runsOf([])).toEqual([]);
  expect(runsOf([0, 1, 4, 6, 7])).toEqual([
    [0, 2],
    [4, 5],
    [6, 8],
  ]);
});

test('SHA-256 in plain JavaScript is the same at each length around a block', async () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000]) {
    const bytes = whole.slice(0, length);
    expect(sha256Plain(bytes)).toBe(digest(bytes));
    expect(await sha256(bytes)).toBe(digest(bytes));
  }
});
