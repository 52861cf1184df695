/** Downloads that are interrupted, damaged, aborted, or already kept. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import { ask, expected, launch, openPage, refusal, startServer } from './support.js';

const DECODER = 'decoder_model_merged.onnx';
const options = { device: 'wasm', precision: 'fp32', threads: 1 } as const;
const { captions } = expected();
const picture = Object.keys(captions)[0]!;
const asking = { options, pictures: [`/pictures/${picture}`] };
const tokens = [captions[picture]!.fp32!.tokens];

let server: TestServer;
let browser: Browser;
let page: Page;
beforeAll(async () => {
  server = await startServer();
  browser = await launch();
});
beforeEach(async () => {
  server.asked.length = 0;
  page = await openPage(browser, server.url); // a new profile: nothing is kept
});
afterEach(async () => {
  server.fault = () => null;
  server.ranges = true;
  await page.context().close();
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

/** Make a fault for the first `times` requests of a file. */
function first(times: number, name: string, fault: ReturnType<TestServer['fault']>) {
  let count = 0;
  return ({ path }: { path: string }) => (path.endsWith(name) && count++ < times ? fault : null);
}

test('progress counts the bytes of exactly the files that are needed', async () => {
  const { progress } = await ask(page, asking);
  const { files } = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  const needed = new Set(server.asked.map(one => one.path.replace('/bundle/', '')));
  const bytes = [...needed].reduce((sum, name) => sum + (files[name]?.size ?? 0), 0);
  const last = progress.at(-1)!;
  expect(last).toMatchObject({ phase: 'ready', loadedBytes: bytes, totalBytes: bytes });
  const loaded = progress.map(one => one.loadedBytes);
  expect(loaded).toEqual([...loaded].sort((a, b) => a - b));
  expect(server.askedFor('.onnx').map(one => one.range)).toEqual([null, null, null, null]);
});

test('the largest graph comes first', async () => {
  await ask(page, asking);
  const { files } = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  const sizes = server.askedFor('.onnx').map(one => files[one.path.replace('/bundle/', '')].size);
  expect(sizes).toEqual([...sizes].sort((a, b) => b - a));
});

test('an interrupted download continues where it stopped', async () => {
  server.fault = first(2, DECODER, { cutAfter: 100_000 });
  const answer = await ask(page, asking);
  expect(answer.tokens).toEqual(tokens);
  const ranges = server.askedFor(DECODER).map(one => one.range);
  expect(ranges).toHaveLength(3);
  const starts = ranges.map(range => Number(/^bytes=(\d+)-/.exec(range ?? '')?.[1] ?? 0));
  expect(starts[1]).toBeGreaterThan(0);
  expect(starts[2]).toBeGreaterThan(starts[1]!);
});

test('an interrupted download continues with a server without byte ranges', async () => {
  server.ranges = false;
  server.fault = first(1, DECODER, { cutAfter: 100_000 });
  expect((await ask(page, asking)).tokens).toEqual(tokens);
});

test('a server that is busy is asked again', async () => {
  server.fault = first(2, DECODER, { status: 503 });
  expect((await ask(page, asking)).tokens).toEqual(tokens);
  expect(server.askedFor(DECODER)).toHaveLength(3);
});

test('a download that is always interrupted ends with the byte where it stopped', async () => {
  server.fault = first(Infinity, DECODER, { cutAfter: 0 });
  const refused = await refusal(page, asking);
  expect(refused.kind).toBe('DownloadError');
  expect(refused.code).toBe('download.failed');
  expect(refused.message).toMatch(/decoder_model_merged\.onnx: .* byte 0 of \d+/);
});

test('a chunk that is damaged once is fetched again', async () => {
  server.fault = first(1, DECODER, { flipByte: 70_000 });
  const answer = await ask(page, asking);
  expect(answer.tokens).toEqual(tokens);
  expect(server.askedFor(DECODER)).toHaveLength(2);
  expect(answer.progress.at(-1)!.loadedBytes).toBe(answer.progress.at(-1)!.totalBytes);
});

test('a chunk that is always damaged is named', async () => {
  server.fault = first(Infinity, DECODER, { flipByte: 70_000 });
  const refused = await refusal(page, asking);
  expect(refused.kind).toBe('BundleError');
  expect(refused.message).toMatch(/decoder_model_merged\.onnx: chunk 1 of 1 /);
});

test('an address without a bundle is refused', async () => {
  const refused = await refusal(page, { ...asking, url: '/nothing/' });
  expect(refused.kind).toBe('BundleError');
  expect(refused.message).toMatch(/nothing\/vlmport\.json.* 404/);
});

test('a second visit fetches the manifest alone, and works without a server', async () => {
  await ask(page, asking);
  server.asked.length = 0;
  await page.reload();
  await page.waitForFunction(() => 'vlmport' in globalThis);
  const bundle = () => server.asked.filter(one => one.path.startsWith('/bundle/'));
  expect((await ask(page, asking)).tokens).toEqual(tokens);
  expect(bundle().map(one => one.path)).toEqual(['/bundle/vlmport.json']);
  server.fault = ({ path }) => (path.startsWith('/bundle/') ? { cutAfter: 0 } : null);
  expect((await ask(page, asking)).tokens).toEqual(tokens);
});

test('kept models are listed and can be deleted', async () => {
  await ask(page, asking);
  const kept = () =>
    page.evaluate(async () => {
      const { cachedModels } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
      return cachedModels();
    });
  const [model] = await kept();
  expect(model).toMatchObject({ name: 'shapes', url: `${server.url}bundle/` });
  expect(model!.bytes).toBeGreaterThan(1_000_000);
  await page.evaluate(async () => {
    const { clearCache } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    await clearCache('/bundle/');
  });
  expect(await kept()).toEqual([]);
  server.asked.length = 0;
  await ask(page, asking);
  expect(server.askedFor(DECODER)).toHaveLength(1);
});

test('two pages that load the same model at once', async () => {
  const other = await page.context().newPage();
  other.setDefaultTimeout(120_000);
  await other.goto(server.url);
  await other.waitForFunction(() => 'vlmport' in globalThis);
  const both = await Promise.all([ask(page, asking), ask(other, asking)]);
  expect(both.map(one => one.tokens)).toEqual([tokens, tokens]);
  expect(both.flatMap(one => one.notes)).toEqual([]);
  server.asked.length = 0;
  expect((await ask(page, asking)).tokens).toEqual(tokens);
  expect(server.askedFor('.onnx')).toEqual([]);
});

test('a model that is deleted while another page loads it', async () => {
  server.fault = first(1, DECODER, { hangAfter: 50_000 }); // it continues after the interruption
  const other = await page.context().newPage();
  await other.goto(server.url);
  await other.waitForFunction(() => 'vlmport' in globalThis);
  const loading = ask(page, asking);
  await expect.poll(() => server.askedFor(DECODER).length, { timeout: 120_000 }).toBe(1);
  await other.evaluate(async () => {
    const { clearCache } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    await clearCache();
  });
  server.breakOff();
  expect((await loading).tokens).toEqual(tokens);
});

test('chunks that only an older version of a model needed are deleted', async () => {
  await ask(page, asking);
  const manifest = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  const hashes = () =>
    page.evaluate(async () => {
      const kept = await (await caches.open('vlmport-1')).keys();
      return kept.map(one => one.url).filter(url => url.includes('/chunks/'));
    });
  const before = await hashes();
  const old = 'ab'.repeat(32);
  await page.evaluate(async old => {
    const cache = await caches.open('vlmport-1');
    await cache.put(`/.vlmport/chunks/${old}`, new Response('of an older version'));
  }, old);
  expect(await hashes()).toHaveLength(before.length + 1);
  await ask(page, asking); // the same version: the chunks are not searched
  expect(await hashes()).toHaveLength(before.length + 1);
  manifest.producer = 'a later one';
  await page.context().route('**/vlmport.json', route => route.fulfill({ json: manifest }));
  await ask(page, asking);
  expect(await hashes()).toEqual(before);
});

test('an abort ends the download, and complete chunks are kept', async () => {
  server.fault = first(1, DECODER, { hangAfter: 50_000 });
  const name = await page.evaluate(async () => {
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 3000);
    const { signal } = controller;
    try {
      await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32', signal });
      return 'loaded';
    } catch (error) {
      return (error as Error).name;
    }
  });
  expect(name).toBe('AbortError');
  server.asked.length = 0;
  expect((await ask(page, asking)).tokens).toEqual(tokens);
  expect(server.askedFor('vision_encoder.onnx')).toEqual([]); // it is the largest
  expect(server.askedFor(DECODER)).toHaveLength(1);
});
