/** The public API, as a program uses it. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import { ask, expected, launch, openPage, refusal, startServer } from './support.js';

interface Page_ {
  readonly vlmport: typeof Vlmport;
}

const { captions, pixelValues } = expected();
const picture = Object.keys(captions)[0]!;
const url = `/pictures/${picture}`;
const { tokens, text } = captions[picture]!.fp32!;

let server: TestServer;
let browser: Browser;
let page: Page;
beforeAll(async () => {
  server = await startServer();
  browser = await launch();
  page = await openPage(browser, server.url);
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

test('maxNewTokens, counts and stop reason', async () => {
  const caption = await page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32' });
    const { tokenIds, stopReason, counts, timings } = await vlm.caption(url, { maxNewTokens: 2 });
    vlm.dispose();
    return { tokenIds, stopReason, counts, timings };
  }, url);
  expect(caption.tokenIds).toEqual(tokens.slice(0, 2));
  expect(caption.stopReason).toBe('length');
  expect(caption.counts).toMatchObject({ newTokens: 2 });
  expect(caption.counts.promptTokens).toBeGreaterThanOrEqual(caption.counts.imageTokens);
  expect(caption.timings.image).toBeGreaterThan(0);
});

test('captions that are requested together run one after the other, and one may be aborted', async () => {
  const found = await page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32' });
    const controller = new AbortController();
    const { signal } = controller;
    const three = [vlm.caption(url), vlm.caption(url, { signal }), vlm.caption(url)];
    controller.abort(new Error('not wanted any more'));
    const settled = await Promise.allSettled(three);
    for await (const _ of vlm.stream(url)) break; // leaving the loop ends the generation
    const after = await vlm.caption(url);
    vlm.dispose();
    const told = settled.map(one =>
      one.status === 'fulfilled' ? String(one.value) : String((one.reason as Error).message),
    );
    return [...told, after.text];
  }, url);
  expect(found).toEqual([text, 'not wanted any more', text, text]);
});

test('an abort in the middle of a text ends it with the reason of the signal', async () => {
  const found = await page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32' });
    const controller = new AbortController();
    const { signal } = controller;
    let pieces = 0;
    try {
      for await (const _ of vlm.stream(url, { signal })) if (++pieces === 1) controller.abort();
    } catch (error) {
      return [(error as Error).name, error === signal.reason];
    } finally {
      vlm.dispose();
    }
    return ['ended'];
  }, url);
  expect(found).toEqual(['AbortError', true]);
});

test.each(['.wasm', 'decoder_model_merged.onnx', 'vlmport.json'])(
  'an abort of a load is heard while %s hangs',
  async name => {
    server.asked.length = 0;
    server.fault = ({ path }) => (path.endsWith(name) ? { hangAfter: 100 } : null);
    const other = await openPage(browser, server.url); // a new profile: nothing is kept
    const aborted = other.evaluate(async () => {
      const { VLM } = (globalThis as unknown as Page_).vlmport;
      const controller = new AbortController();
      (globalThis as unknown as { giveUp: () => void }).giveUp = () => controller.abort('enough');
      const { signal } = controller;
      const options = { device: 'wasm', precision: 'fp32', signal } as const;
      return VLM.load('/bundle/', options).catch((reason: unknown) => reason);
    });
    await expect.poll(() => server.askedFor(name).length, { timeout: 60_000 }).toBeGreaterThan(0);
    await other.evaluate(() => (globalThis as unknown as { giveUp: () => void }).giveUp());
    const late = new Promise(resolve => setTimeout(resolve, 20_000, 'not heard'));
    expect(await Promise.race([aborted, late])).toBe('enough');
    server.fault = () => null;
    await other.context().close();
  },
);

test('a caption that begins with a stop token is empty', async () => {
  const manifest = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  manifest.generation.stop_token_ids.push(tokens[0]);
  const other = await openPage(browser, server.url);
  await other.context().route('**/vlmport.json', route => route.fulfill({ json: manifest }));
  const options = { device: 'wasm', precision: 'fp32' } as const;
  const answer = await ask(other, { options, pictures: [url] });
  expect(answer).toMatchObject({ tokens: [[tokens[0]]], texts: [''], streamed: [''] });
  await other.context().close();
});

test("the model's own decoding options are followed, and a note names one that can't be", async () => {
  const manifest = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  const defaults = { repetition_penalty: 1.2, num_beams: 3, temperature: 0.6, guidance_scale: 3 };
  manifest.generation.defaults = defaults;
  const other = await openPage(browser, server.url);
  await other.context().route('**/vlmport.json', route => route.fulfill({ json: manifest }));
  const answer = (on: Page, options: Vlmport.CaptionOptions) =>
    on.evaluate(
      async ({ url, options }) => {
        const { VLM } = (globalThis as unknown as Page_).vlmport;
        const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32' });
        const { tokenIds, score } = await vlm.caption(url, options);
        let code = 'none';
        try {
          vlm.stream(url, options);
        } catch (error) {
          code = (error as Vlmport.VlmportError).code;
        }
        vlm.dispose();
        return { tokenIds, score, code, notes: vlm.notes };
      },
      { url, options },
    );
  const byDefault = await answer(other, {});
  const asked = await answer(page, { repetitionPenalty: 1.2, numBeams: 3 });
  expect(byDefault.notes).toEqual([
    expect.stringMatching(/^generation_config\.json: .* guidance_scale=3 .*; left out$/),
  ]);
  expect(asked.notes).toEqual([]);
  expect([byDefault.tokenIds, byDefault.score]).toEqual([asked.tokenIds, asked.score]);
  expect(asked.score).toBeLessThan(0);
  expect([byDefault.code, asked.code]).toEqual(['option.contradiction', 'option.contradiction']);
  const greedy = await answer(other, { numBeams: 1, repetitionPenalty: null });
  expect(greedy).toMatchObject({ tokenIds: tokens, score: null, code: 'none' });
  await other.context().close();
});

test('several captions are returned, and images are captioned one after the other', async () => {
  const found = await page.evaluate(async url => {
    const { VLM, VlmportError } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32' });
    const options = { doSample: true, temperature: 2, numReturnSequences: 3, logprobs: 1 };
    const first = await vlm.caption(url, options);
    const again = await vlm.caption(url, { ...options, seed: first.seed });
    const texts = (caption: Vlmport.Caption) =>
      [caption, ...caption.alternatives].map(one => one.text);
    const each: string[] = [];
    for await (const result of vlm.captionEach([url, new Blob(['no image']), url])) {
      each.push(result instanceof VlmportError ? result.code : result.text);
    }
    let code = 'none';
    try {
      vlm.captionEach([], { topK: -1, doSample: true });
    } catch (error) {
      code = (error as Vlmport.VlmportError).code;
    }
    vlm.dispose();
    const places = first.logprobs!.map(({ token, top }) => [token, top.length] as const);
    return { texts: texts(first), again: texts(again), each, code, places, ids: first.tokenIds };
  }, url);
  expect(found.texts.length).toBe(3);
  expect(found.again).toEqual(found.texts);
  expect(found.places).toEqual(found.ids.map(id => [id, 1]));
  expect(found.each).toEqual([text, expect.stringMatching(/^image\./), text]);
  expect(found.code).toBe('option.wrong-value');
});

test('after dispose each call ends with an error', async () => {
  const codes = await page.evaluate(async url => {
    const { VLM, VlmportError } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32' });
    const running = vlm.caption(url);
    vlm.dispose();
    const settled = await Promise.allSettled([running, vlm.caption(url)]);
    return settled.map(one =>
      one.status === 'rejected' && one.reason instanceof VlmportError ? one.reason.kind : 'none',
    );
  }, url);
  expect(codes).toEqual(['WorkerError', 'WorkerError']);
});

test('unknown options and values are refused, with the nearest known', async () => {
  const load = (options: object) => refusal(page, { options });
  expect(await load({ devise: 'wasm' })).toMatchObject({
    kind: 'OptionError',
    code: 'option.unknown',
    message: expect.stringMatching(/'devise' .*'device'/),
  });
  expect(await load({ device: 'gpu' })).toMatchObject({ code: 'device.unknown' });
  expect(await load({ threads: 0 })).toMatchObject({ kind: 'OptionError' });
  expect(await load({ precision: 8 })).toMatchObject({
    kind: 'OptionError',
    code: 'option.wrong-value',
    message: expect.stringMatching(/precision .*8$/),
  });
  expect(await load({ wasmPaths: 'http://' })).toMatchObject({
    kind: 'OptionError',
    code: 'option.wrong-value',
    message: expect.stringMatching(/^wasmPaths 'http:\/\/'/),
  });
  expect(await refusal(page, { url: 'http://' })).toMatchObject({
    kind: 'OptionError',
    code: 'option.wrong-value',
    message: expect.stringMatching(/^'http:\/\/'/),
  });
  expect(await load({ precision: 'q3', device: 'wasm' })).toMatchObject({
    kind: 'BundleError',
    code: 'precision.not-in-bundle',
    message: expect.stringMatching(/^precision 'q3'/),
  });
});

test('PrefixConditioningVLM gives the same captions, and takes options of decoding', async () => {
  const found = await page.evaluate(
    async ({ url, pixelValues }) => {
      const { PrefixConditioningVLM, VLM } = (globalThis as unknown as Page_).vlmport;
      const model = new PrefixConditioningVLM();
      const said: string[] = [];
      const attempt = async (work: Promise<string>) =>
        said.push(await work.catch(error => `${error.code}: ${error.message}`));
      await attempt(model.caption(url));
      const percents: number[] = [];
      await model.loadModel('./bundle/', { onProgress: (_, percent) => percents.push(percent) });
      await attempt(model.caption(url));
      await attempt(model.generate(url, { maxLength: 30, numBeams: 1, doSample: false }));
      const data = Float32Array.from(pixelValues.data);
      await attempt(model.generate({ dims: pixelValues.dims, data }));
      await attempt(model.generate({ dims: [1, 3, 9], data }));
      await attempt(model.generate(url, { numBeams: 3 }));
      await attempt(model.generate(url, { doSample: true, topK: 1, topP: 0.9, temperature: 2 }));
      await attempt(model.generate(url, { temperature: 0.5 }));
      await attempt(model.generate(url, { maxLength: 0 }));
      model.dispose();
      const vlm = await VLM.load('./bundle/');
      said.push((await vlm.caption(url, { numBeams: 3 })).text);
      vlm.dispose();
      return { said, last: percents.at(-1) };
    },
    { url, pixelValues },
  );
  expect(found.last).toBe(100);
  expect(found.said[0]).toMatch(/^model\.not-loaded: /);
  expect(found.said[4]).toMatch(/^image\.wrong-array: .*\[1,3,9\].* pixel_values/);
  const { text } = captions[picture]!.q8!; // it loads 'auto', which is q8 on WebAssembly
  expect(found.said.slice(5)).toEqual([
    found.said[9], // of beams
    text, // the most likely token is sampled
    expect.stringMatching(/^option\.contradiction: temperature .*doSample/),
    expect.stringMatching(/^option\.wrong-value: maxLength=0, .* 1$/),
    expect.stringMatching(/\w/),
  ]);
  expect(found.said.slice(1, 4)).toEqual(Array(3).fill(text));
});

test('PrefixConditioningVLM: dispose ends a load, and of two loads the last counts', async () => {
  const found = await page.evaluate(async url => {
    const { PrefixConditioningVLM } = (globalThis as unknown as Page_).vlmport;
    const model = new PrefixConditioningVLM();
    const name = (error: unknown) => (error as Error).name;
    const first = model.loadModel('./bundle/').then(() => 'loaded', name);
    model.dispose();
    const second = model.loadModel('./bundle/').then(() => 'loaded', name);
    const third = model.loadModel('./bundle/').then(() => 'loaded', name);
    const ends = await Promise.all([first, second, third]);
    const text = await model.caption(url);
    model.dispose();
    return [...ends, text];
  }, url);
  const { text } = captions[picture]!.q8!;
  expect(found).toEqual(['AbortError', 'AbortError', 'loaded', text]);
});
