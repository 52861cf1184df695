/** Conversations: when a turn counts, which questions are refused, and what is kept. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import { type CountedPage, folders, launch, openCounted, startServer } from './support.js';

let server: TestServer;
let browser: Browser;
let page: Page;
beforeAll(async () => {
  server = await startServer({ '/tiles/': folders.tiles() });
  browser = await launch();
  page = await openCounted(browser, server);
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

/** Run in a page with `vlm`, a model on WebAssembly, and `outcome`, an error's code and message. */
async function inPage<T>(work: (vlm: Vlmport.VLM, outcome: Outcome) => Promise<T>): Promise<T> {
  return (await page.evaluate(`(async () => {
      const vlm = await vlmport.VLM.load('/tiles/', { device: 'wasm', precision: 'fp32' });
      const outcome = work => Promise.resolve().then(work).then(
        () => 'fine', error => (error.code ?? error.name) + ': ' + error.message);
      const found = await (${work.toString()})(vlm, outcome);
      vlm.dispose();
      return found;
    })()`)) as T;
}

type Outcome = (work: () => unknown) => Promise<string>;

test('an aborted turn does not change the conversation, and its work is kept', async () => {
  const found = await inPage(async vlm => {
    const chat = vlm.conversation();
    const images = ['/kinds/rgb.png'];
    await chat.ask('What is it?', { images, maxNewTokens: 5 });
    const before = JSON.stringify(chat.messages);
    const controller = new AbortController();
    const { signal } = controller;
    const reason = new Error('enough');
    const aborted = chat.stream('Where?', { signal, maxNewTokens: 9 });
    await aborted.next();
    controller.abort(reason);
    const thrown = await (async () => {
      for await (const _ of aborted);
    })().catch((error: unknown) => error);
    const kept = JSON.stringify(chat.messages) === before;
    for await (const _ of chat.stream('Where?', { maxNewTokens: 9 })) break; // left early
    const left = JSON.stringify(chat.messages) === before;
    const again = await chat.ask('Where?', { maxNewTokens: 9 });
    const fresh = await vlm.generate(chat.messages.slice(0, -1), { maxNewTokens: 9 });
    const { promptTokens, cachedTokens } = again.counts;
    const said = chat.messages.map(one => one.role);
    const same = again.tokenIds.join() === fresh.tokenIds.join();
    return { end: thrown === reason, kept, left, said, same, rest: promptTokens - cachedTokens };
  });
  // The whole prompt is in the cache, except one token whose logits are needed.
  const said = ['user', 'assistant', 'user', 'assistant'];
  expect(found).toEqual({ end: true, kept: true, left: true, said, same: true, rest: 1 });
});

test('a bad question is refused, and does not change the conversation', async () => {
  const found = await inPage(async (vlm, outcome) => {
    const chat = vlm.conversation({ system: 'Be brief.' });
    await chat.ask('What is it?', { images: ['/kinds/rgb.png'], maxNewTokens: 2 });
    const before = JSON.stringify(chat.messages);
    const user = (content: unknown) => [{ role: 'user', content }] as Vlmport.Message[];
    const text = { type: 'text', text: 'x' };
    const outcomes = [
      await outcome(() => chat.ask('?', { images: ['/kinds/nowhere.png'] })),
      await outcome(() => chat.ask('word '.repeat(2000), { images: ['/kinds/tall.png'] })),
      await outcome(() => chat.ask('?', { images: '/kinds/rgb.png' as never })),
      await outcome(() => chat.ask(5 as never)),
      await outcome(() => chat.ask('half \ud83d')),
      await outcome(() => chat.ask('?', { numBeam: 2 } as never)),
      await outcome(() => chat.attach('/kinds/nowhere.png')),
      await outcome(() => vlm.conversation({ sistem: 'x' } as never)),
      await outcome(() => vlm.conversation({ imageOptions: { do_split: 1 } }).ask('?')),
      await outcome(() =>
        vlm.conversation({ imageOptions: { do_image_splitting: 1 } }).attach('/kinds/rgb.png'),
      ),
      await outcome(() => vlm.generate([])),
      await outcome(() => vlm.generate([{ role: 'bot', content: 'x' }] as never)),
      await outcome(() => vlm.generate(user([{ type: 'video', video: 'x.mp4' }]))),
      await outcome(() => vlm.generate(user([{ type: 'image' }]))),
      await outcome(() => vlm.generate(user([text]), { images: ['/kinds/rgb.png'] })),
      await outcome(() => vlm.generate(user('an <image> by hand'), { maxNewTokens: 1 })),
    ];
    return { outcomes, kept: JSON.stringify(chat.messages) === before };
  });
  expect(found.kept).toBe(true);
  expect(found.outcomes).toEqual([
    expect.stringMatching(/^image\.not-fetched: .*nowhere\.png.* 404/),
    expect.stringMatching(/^prompt\.too-long: .* \d+ tokens.* 2048/),
    expect.stringMatching(/^prompt\.wrong-value: images .*"\/kinds\/rgb\.png"/),
    expect.stringMatching(/^prompt\.wrong-value: .* number$/),
    expect.stringMatching(/^prompt\.not-unicode: messages\[0\]\.content\[0\].* 5: "\\ud83d"$/),
    expect.stringMatching(/^option\.unknown: .*'numBeam' .*'numBeams'/),
    expect.stringMatching(/^image\.not-fetched: .*nowhere\.png.* 404/),
    expect.stringMatching(/^option\.unknown: .*'sistem' .*'system'/),
    expect.stringMatching(/^option\.unknown: .*'do_split'/),
    expect.stringMatching(/^option\.wrong-value: .*do_image_splitting=1: .*bool/),
    expect.stringMatching(/^prompt\.wrong-value: messages .*\[\]$/),
    expect.stringMatching(/^prompt\.unknown-role: messages\[0\].*"bot"/),
    expect.stringMatching(/^prompt\.unknown-part: messages\[0\]\.content\[0\].*x\.mp4/),
    expect.stringMatching(/^prompt\.image-count: 0 images .* 1 image part /),
    expect.stringMatching(/^prompt\.image-count: 1 image .* 0 image parts /),
    'fine',
  ]);
});

test('a conversation that is too long is refused before anything is encoded', async () => {
  const found = await page.evaluate(async () => {
    const { vlmport, forgetRuns } = globalThis as unknown as CountedPage;
    const vlm = await vlmport.VLM.load('/tiles/', { device: 'wasm', precision: 'fp32' });
    const chat = vlm.conversation();
    await forgetRuns();
    const images = ['/kinds/rgb.png'];
    const error = await chat.ask('word '.repeat(2000), { images }).catch((thrown: Error) => thrown);
    const runs = await forgetRuns();
    vlm.dispose();
    return {
      code: (error as Vlmport.VlmportError).code,
      fed: runs.map(fed => Object.keys(fed).sort()),
    };
  });
  expect(found.code).toBe('prompt.too-long');
  // Only the image processor ran, which gives the number of tokens.
  expect(found.fed).toEqual([['do_image_splitting', 'image']]);
});

test('a full conversation is refused, or with dropOldest goes on without its oldest turns', async () => {
  const found = await inPage(async (vlm, outcome) => {
    const long = 'word '.repeat(140);
    const images = ['/kinds/rgb.png'];
    const talk = async (chat: Vlmport.Conversation) => {
      const outcomes = [await outcome(() => chat.ask(long, { images, maxNewTokens: 1 }))];
      for (let turn = 0; turn < 3; turn++) {
        outcomes.push(await outcome(() => chat.ask(long, { maxNewTokens: 2 })));
      }
      return outcomes;
    };
    const strict = vlm.conversation();
    const refused = await talk(strict);
    const dropping = vlm.conversation({ system: 'Be brief.', dropOldest: true });
    const fine = await talk(dropping);
    const last = await dropping.ask('And?', { images, maxNewTokens: 4 });
    const fresh = await vlm.generate(dropping.messages.slice(0, -1), { maxNewTokens: 4 });
    const same = last.tokenIds.join() === fresh.tokenIds.join();
    const alone = await outcome(() => dropping.ask('word '.repeat(2000)));
    const { role } = dropping.messages[0]!;
    return { refused, fine, same, role, kept: dropping.messages.length, alone };
  });
  expect(found.refused.at(-1)).toMatch(/^conversation\.full: /);
  expect(found.fine).toEqual(['fine', 'fine', 'fine', 'fine']);
  expect(found).toMatchObject({ same: true, role: 'system' });
  expect(found.kept).toBeLessThan(11);
  expect(found.alone).toMatch(/^prompt\.too-long: /);
});

test('attached images come first, and wait until a question succeeds', async () => {
  const found = await inPage(async (vlm, outcome) => {
    const chat = vlm.conversation();
    await chat.attach('/kinds/rgb.png');
    const waiting = [chat.attached];
    await outcome(() => chat.ask('word '.repeat(2000)));
    waiting.push(chat.attached);
    const answer = await chat.ask('Which?', { images: ['/kinds/tall.png'], maxNewTokens: 3 });
    waiting.push(chat.attached);
    const direct = await vlm.generate(chat.messages.slice(0, -1), { maxNewTokens: 3 });
    await chat.attach('/kinds/tall.png');
    chat.detach();
    waiting.push(chat.attached);
    const parts = chat.messages[0]!.content as readonly Vlmport.ImagePart[];
    const images = parts.map(one => one.image ?? null);
    return { waiting, images, same: direct.tokenIds.join() === answer.tokenIds.join() };
  });
  expect(found).toEqual({
    waiting: [1, 1, 0, 0],
    images: ['/kinds/rgb.png', '/kinds/tall.png', null],
    same: true,
  });
});

test('a reset keeps only the system message, and one question is answered at a time', async () => {
  const found = await inPage(async (vlm, outcome) => {
    const chat = vlm.conversation({ system: 'Be brief.' });
    const first = await chat.ask('What is it?', { images: ['/kinds/rgb.png'], maxNewTokens: 3 });
    const running = chat.ask('Where?', { maxNewTokens: 3 });
    const meanwhile = await outcome(() => chat.ask('And?'));
    chat.reset();
    const reset = await outcome(() => running);
    const roles = chat.messages.map(one => one.role);
    const again = await chat.ask('What is it?', { images: ['/kinds/rgb.png'], maxNewTokens: 3 });
    chat.messages.push({ role: 'user', content: 'not heard' }); // it is a copy
    const same = first.tokenIds.join() === again.tokenIds.join();
    const { length } = chat.messages;
    return { meanwhile, reset, roles, same, cached: again.counts.cachedTokens, length };
  });
  expect(found).toEqual({
    meanwhile: expect.stringMatching(/^conversation\.busy: /),
    reset: expect.stringMatching(/^conversation\.went-on: /),
    roles: ['system'],
    same: true,
    cached: 0,
    length: 3,
  });
});

test('images are found in the cache by their pixels, in conversations and outside', async () => {
  const found = await page.evaluate(async () => {
    const { vlmport, forgetRuns } = globalThis as unknown as CountedPage;
    const vlm = await vlmport.VLM.load('/tiles/', { device: 'wasm', precision: 'fp32' });
    const encoded = async (work: () => Promise<unknown>) => {
      await forgetRuns();
      await work();
      return (await forgetRuns()).filter(fed => 'pixel_values' in fed).length;
    };
    const blob = await (await fetch('/kinds/rgb.png')).blob();
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
    const short = { maxNewTokens: 1 };
    const counts = [
      await encoded(() => vlm.caption('/kinds/rgb.png', short)),
      await encoded(() => vlm.caption(blob, short)),
      await encoded(() => vlm.conversation().ask('?', { images: [bitmap, blob], ...short })),
      await encoded(() =>
        vlm.caption(blob, { ...short, imageOptions: { do_image_splitting: false } }),
      ),
      await encoded(() => (vlm.forgetImages(), vlm.caption(blob, short))),
    ];
    vlm.dispose();
    return counts;
  });
  expect(found).toEqual([7, 0, 0, 1, 7]);
});
