/** Pages without a GPU, threads, storage or a worker: each works, or gives the reason. */

import type { Browser } from 'playwright-core';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import type { TestServer } from './server.js';
import { type Answer, ask, expected, launch, openPage, refusal, startServer } from './support.js';

const { captions } = expected();
const picture = Object.keys(captions)[0]!;
const INSECURE = 'insecure.test';

let server: TestServer;
let browser: Browser;
beforeAll(async () => {
  server = await startServer();
  browser = await launch({ args: [`--host-resolver-rules=MAP ${INSECURE} 127.0.0.1`] });
});
afterEach(() => {
  server.isolated = true;
  server.fault = () => null;
  server.workerPrelude = '';
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

async function visit(url = server.url): Promise<Answer> {
  const page = await openPage(browser, url);
  const answer = await ask(page, {
    options: { precision: 'fp32' },
    pictures: [`/pictures/${picture}`],
  });
  await page.context().close();
  expect(answer.tokens).toEqual([captions[picture]!.fp32!.tokens]);
  expect(answer.device).toBe('wasm');
  return answer;
}

test('no GPU', async () => {
  expect((await visit()).reason).toMatch(/^WebGPU is not used: .*\(no adapter\)$/);
});

test('no threads', async () => {
  server.isolated = false;
  const { threads, notes } = await visit();
  expect(threads).toBe(1);
  expect(notes.join('\n')).toMatch(/^one thread: .*COOP and COEP/m);
});

test('no Cache Storage', async () => {
  server.workerPrelude = "Object.defineProperty(globalThis, 'caches', { value: undefined })";
  const { notes } = await visit();
  expect(notes).toEqual([expect.stringMatching(/^not kept .* no Cache Storage$/)]);
});

test('Cache Storage that is refused', async () => {
  server.workerPrelude = "CacheStorage.prototype.open = () => Promise.reject(new Error('no'))";
  const { notes } = await visit();
  expect(notes[0]).toMatch(/^not kept .*private window/);
});

test('Cache Storage that is full', async () => {
  server.workerPrelude =
    "Cache.prototype.put = () => Promise.reject(new DOMException('full', 'QuotaExceededError'))";
  const { notes } = await visit();
  expect(notes[0]).toMatch(/^not kept .*space/);
});

test('Cache Storage that is unreadable', async () => {
  server.workerPrelude = "Cache.prototype.match = () => Promise.reject(new Error('no'))";
  const { notes } = await visit();
  expect(notes[0]).toMatch(/^not kept .*read/);
});

test.each(['auto', 'wasm'] as const)("%s: ONNX Runtime's own file does not load", async device => {
  server.fault = ({ path }) => (path.endsWith('.wasm') ? { status: 404 } : null);
  const page = await openPage(browser, server.url);
  const refused = await refusal(page, { options: { device, precision: 'fp32' } });
  expect(refused).toMatchObject({ kind: 'DownloadError', code: 'runtime.not-loaded' });
  expect(refused.hint).toMatch(/wasmPaths/);
  await page.context().close();
});

test('no worker', async () => {
  const page = await openPage(browser, server.url);
  await page.evaluate(() => {
    globalThis.Worker = class {
      constructor() {
        throw new DOMException('cannot be accessed from origin', 'SecurityError');
      }
    } as unknown as typeof Worker;
  });
  expect(await refusal(page, {})).toMatchObject({
    kind: 'WorkerError',
    code: 'worker.not-started',
    message: expect.stringMatching(/cannot be accessed from origin/),
    hint: expect.stringMatching(/CSP/),
  });
  await page.context().close();
});

test('an insecure origin', async () => {
  const { reason, threads, notes } = await visit(`http://${INSECURE}:${server.port}/`);
  expect(reason).toMatch(/^WebGPU is not used: .*https or localhost$/);
  expect(threads).toBe(1);
  expect(notes.join('\n')).toMatch(/https or localhost.*Cache Storage/);
});
