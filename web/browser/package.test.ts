/** The package as npm packs it, used as its README says: without a bundler, and built by Vite. */

import { join } from 'node:path';
import type { Browser } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { TestServer } from './server.js';
import { expected, folders, launch } from './support.js';

const SAMPLE = 'red_square.png';
const { captions } = expected();

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

test.each(['plain', 'built'] as const)('%s', async kind => {
  const server = await TestServer.start({
    '/': folders.packed()[kind],
    '/bundle/': folders.bundle(),
    '/pictures/': folders.pictures(),
  });
  const page = await (await browser.newContext()).newPage();
  page.setDefaultTimeout(120_000);
  await page.goto(server.url);
  await page.waitForFunction(() => document.body.textContent?.trim());
  expect(await page.textContent('body')).toContain(captions[SAMPLE]!.q8!.text);
  // There is no GPU, so only the smaller of the two builds of ONNX Runtime is fetched.
  expect(server.askedFor('.wasm').map(one => one.path)).toEqual([
    expect.stringMatching(/ort-wasm-simd-threaded-[^.]*\.wasm$/),
  ]);
  await page.context().close();
  await server.stop();
});

test('the page in examples/ captions a file', async () => {
  const server = await TestServer.start({
    '/page/': join(folders.pictures(), 'web_page'),
    '/page/standalone/': join(folders.packed().plain, 'standalone'),
    '/page/bundle/': folders.bundle(),
  });
  const page = await (await browser.newContext()).newPage();
  page.setDefaultTimeout(120_000);
  await page.goto(`${server.url}page/`);
  await page.waitForFunction(() => document.querySelector('output')?.textContent?.match(/ready/));
  await page.setInputFiles('input', join(folders.pictures(), SAMPLE));
  const said = captions[SAMPLE]!.q8!.text;
  await page.waitForFunction(
    text => document.querySelector('output')?.textContent?.includes(text),
    said,
  );
  expect((await page.textContent('output'))?.trim()).toBe(said.trim());
  await page.context().close();
  await server.stop();
});
