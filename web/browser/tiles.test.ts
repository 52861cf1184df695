/**
 * Captions of a model that cuts images into tiles and has a chat template. turns.test.ts runs it on
 * WebGPU.
 */

import type { Browser } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import { ask, expected, folders, launch, openPage, refusal, startServer } from './support.js';

const { tiles } = expected();
const urls = Object.keys(tiles).map(name => `/kinds/${name}`);
const asking = { url: '/tiles/', pictures: urls, maxNewTokens: 12 };

let server: TestServer;
let browser: Browser;
beforeAll(async () => {
  server = await startServer({ '/tiles/': folders.tiles() });
  browser = await launch();
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

test('the same tokens as Python', async () => {
  const page = await openPage(browser, server.url);
  const options = { device: 'wasm', precision: 'fp32', threads: 1 } as const;
  const answer = await ask(page, { ...asking, options });
  expect(answer).toMatchObject({ device: 'wasm', reason: null, notes: [] });
  expect(answer.tokens).toEqual(Object.values(tiles).map(one => one.tokens));
  expect(answer.texts).toEqual(Object.values(tiles).map(one => one.text));
  expect(answer.streamed).toEqual(answer.texts);
  await page.context().close();
});

test('images of other sizes have other numbers of tiles', () => {
  expect(new Set(Object.values(tiles).map(one => one.count)).size).toBeGreaterThan(1);
});

test('the image processor gets the options of the manifest', async () => {
  const page = await openPage(browser, server.url);
  const manifest = await (await fetch(`${server.url}tiles/vlmport.json`)).json();
  const options = { device: 'wasm', precision: 'fp32' } as const;
  const counts = async () =>
    page.evaluate(async url => {
      const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
      const vlm = await VLM.load('/tiles/', { device: 'wasm', precision: 'fp32' });
      const { counts } = await vlm.caption(url, { maxNewTokens: 1 });
      vlm.dispose();
      return counts.imageTokens;
    }, urls[0]!);
  const cut = await counts();
  expect(cut).toBe(Object.values(tiles)[0]!.imageTokens);
  manifest.image_options.do_image_splitting = false;
  await page.context().route('**/vlmport.json', route => route.fulfill({ json: manifest }));
  expect(await counts()).toBe(cut / Object.values(tiles)[0]!.count);
  manifest.image_options.do_image_rotation = 1;
  expect(await refusal(page, { ...asking, options })).toMatchObject({
    kind: 'BundleError',
    code: 'bundle.wrong-graph',
    message: expect.stringMatching(/^image_processor: .*'do_image_rotation'/),
  });
  await page.context().close();
});

test('pixel values of another program are refused where images have several tiles', async () => {
  const page = await openPage(browser, server.url);
  const message = await page.evaluate(async () => {
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const vlm = await VLM.load('/tiles/', { device: 'wasm', precision: 'fp32' });
    const values = { dims: [1, 1, 3, 32, 32], data: new Float32Array(3 * 32 * 32) };
    const error = (await vlm
      .caption(values)
      .catch((thrown: unknown) => thrown)) as Vlmport.VlmportError;
    vlm.dispose();
    return `${error.code}: ${error.message}`;
  });
  expect(message).toMatch(/^image\.wrong-array: .*\[1,1,3,32,32\]/);
  await page.context().close();
});
