/** Pages that lack something: each works, or says why not. */

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
  expect((await visit()).reason).toBe(
    'WebGPU is not used: this browser offers WebGPU, but no GPU that works (no adapter)',
  );
});

test('no threads', async () => {
  server.isolated = false;
  const { threads, notes } = await visit();
  expect(threads).toBe(1);
  expect(notes).toContain(
    'one thread: the page is not cross-origin isolated (COOP and COEP headers)',
  );
});

test('no Cache Storage', async () => {
  server.workerPrelude = "Object.defineProperty(globalThis, 'caches', { value: undefined })";
  const { notes } = await visit();
  expect(notes).toEqual(['not kept for the next visit: this browser has no Cache Storage']);
});

test('Cache Storage that is refused', async () => {
  server.workerPrelude = "CacheStorage.prototype.open = () => Promise.reject(new Error('no'))";
  const { notes } = await visit();
  expect(notes[0]).toMatch(/the browser refuses Cache Storage here/);
});

test('Cache Storage that is full', async () => {
  server.workerPrelude =
    "Cache.prototype.put = () => Promise.reject(new DOMException('full', 'QuotaExceededError'))";
  const { notes } = await visit();
  expect(notes[0]).toMatch(/no room left/);
});

test('Cache Storage that can not be read', async () => {
  server.workerPrelude = "Cache.prototype.match = () => Promise.reject(new Error('no'))";
  const { notes } = await visit();
  expect(notes[0]).toMatch(/the browser can't read what it keeps/);
});

test.each(['auto', 'wasm'] as const)("%s: ONNX Runtime's own file does not come", async device => {
  server.fault = ({ path }) => (path.endsWith('.wasm') ? { status: 404 } : null);
  const page = await openPage(browser, server.url);
  const refused = await refusal(page, { options: { device, precision: 'fp32' } });
  expect(refused.kind).toBe('DownloadError');
  expect(refused.message).toMatch(/^ONNX Runtime can't be loaded \(/);
  expect(refused.hint).toMatch(/check the connection/);
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
  expect(await refusal(page, {})).toEqual({
    kind: 'WorkerError',
    message: "the worker can't be started (cannot be accessed from origin)",
    hint: 'serve the package from the origin of the page, and let its policy (CSP) allow workers',
  });
  await page.context().close();
});

test('an insecure origin', async () => {
  const { reason, threads, notes } = await visit(`http://${INSECURE}:${server.port}/`);
  expect(reason).toBe('WebGPU is not used: WebGPU needs a page on https or localhost');
  expect(threads).toBe(1);
  expect(notes.join('\n')).toMatch(/not on https or localhost, so the browser offers no Cache/);
});
