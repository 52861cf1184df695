/** The demo page, and a second visit to it without a server. */

import { fileURLToPath } from 'node:url';
import type { Browser, BrowserContextOptions, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { expected, folders, launch } from './support.js';
import { TestServer } from './server.js';

const { captions } = expected();
const BUILT = fileURLToPath(new URL('../../src/vlmport/web_page', import.meta.url));
const SAMPLE = 'red_square.png';

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

/** Open a page as a new visitor. */
async function visitor(options: BrowserContextOptions = {}): Promise<Page> {
  const page = await (await browser.newContext(options)).newPage();
  page.setDefaultTimeout(120_000);
  return page;
}

async function captionSample(page: Page): Promise<string> {
  await page.waitForSelector('#facts:not([hidden])');
  await page.click('#samples button');
  await page.waitForFunction(() =>
    /\d/.test(document.getElementById('fact-speed')?.textContent ?? ''),
  );
  return (await page.textContent('#caption')) ?? '';
}

test('a visit, and a second one with the server stopped and the page loaded again', async () => {
  const server = await TestServer.start({ '/': BUILT, '/bundle/': folders.bundle() });
  const page = await visitor();
  await page.goto(server.url);
  const first = await captionSample(page);
  expect(first).toBe(captions[SAMPLE]!.q8!.text);
  await page.evaluate(() => navigator.serviceWorker.ready);
  await page.waitForFunction(() => navigator.serviceWorker.controller !== null);
  await server.stop();
  await page.reload();
  expect(await captionSample(page)).toBe(first);
  expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
  await page.context().close();
});

test.runIf(process.env.VLMPORT_WEB_DEMO)('`vlmport demo` serves it', async () => {
  const page = await visitor();
  const errors: string[] = [];
  page.on('pageerror', error => errors.push(error.message));
  page.on('console', message => message.type() === 'error' && errors.push(message.text()));
  await page.addInitScript(() => {
    addEventListener('securitypolicyviolation', event => console.error(event.violatedDirective));
  });
  const answer = await page.goto(process.env.VLMPORT_WEB_DEMO!);
  expect(answer?.headers()['content-security-policy']).toContain("default-src 'none'");
  expect(await captionSample(page)).toBe(captions[SAMPLE]!.q8!.text);
  expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
  expect(await page.textContent('#fact-device')).toMatch(/^WebAssembly/);
  await page.setInputFiles('#file', `${folders.pictures()}/${SAMPLE}`); // shown by a blob's address
  await page.waitForFunction(() => {
    const preview = document.querySelector<HTMLImageElement>('#preview');
    return preview?.src.startsWith('blob:') && preview.naturalWidth > 0;
  });
  expect(errors).toEqual([]);
  await page.context().close();
});

test.each([
  ['desktop', 1280, 800],
  ['phone', 360, 740],
])('nothing is wider than the page: %s', async (_, width, height) => {
  const server = await TestServer.start({ '/': BUILT, '/bundle/': folders.bundle() });
  const page = await visitor({ viewport: { width, height } });
  await page.goto(server.url);
  await captionSample(page);
  expect(await page.evaluate(() => getComputedStyle(document.body).display)).toBe('grid'); // styled
  expect(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth)).toBe(true);
  await page.context().close();
  await server.stop();
});

test('a load that was stopped can be started again', async () => {
  const server = await TestServer.start({ '/': BUILT, '/bundle/': folders.bundle() });
  server.fault = ({ path }) => (path.includes('vision_encoder') ? { hangAfter: 1000 } : null);
  const page = await visitor();
  await page.goto(server.url);
  await page.waitForFunction(() => /Loading/.test(document.getElementById('status')!.textContent!));
  await page.click('#stop');
  await page.waitForSelector('#error:not([hidden])');
  expect(await page.textContent('#error-message')).toBe('Stopped.');
  server.fault = () => null;
  await page.click('#again');
  expect(await captionSample(page)).toBe(captions[SAMPLE]!.q8!.text);
  expect(await page.isHidden('#error')).toBe(true);
  await page.context().close();
  await server.stop();
});

test('a file that is not an image shows no broken image, and the next one is captioned', async () => {
  const server = await TestServer.start({ '/': BUILT, '/bundle/': folders.bundle() });
  const page = await visitor();
  await page.goto(server.url);
  await page.waitForSelector('#facts:not([hidden])');
  const buffer = Buffer.from('no picture');
  await page.setInputFiles('#file', { name: 'x.png', mimeType: 'image/png', buffer });
  await page.waitForSelector('#error:not([hidden])');
  expect(await page.textContent('#error-message')).toMatch(/^Not an image.* text\.$/);
  expect(await page.isHidden('#preview')).toBe(true);
  expect(await page.isHidden('#again')).toBe(true);
  expect(await captionSample(page)).toBe(captions[SAMPLE]!.q8!.text);
  expect(await page.isVisible('#preview')).toBe(true);
  await page.context().close();
  await server.stop();
});

test('the same file can be chosen again, and the memory of earlier files is freed', async () => {
  const server = await TestServer.start({ '/': BUILT, '/bundle/': folders.bundle() });
  const page = await visitor();
  await page.addInitScript(() => {
    const made: string[] = [];
    const create = URL.createObjectURL.bind(URL);
    URL.createObjectURL = file => (made.push(create(file)), made.at(-1)!);
    Object.assign(globalThis, { made });
  });
  await page.goto(server.url);
  await page.waitForSelector('#facts:not([hidden])');
  const file = `${folders.pictures()}/${SAMPLE}`;
  const made = () => page.evaluate(() => (globalThis as unknown as { made: string[] }).made);
  for (const times of [1, 2]) {
    await page.setInputFiles('#file', file);
    await expect.poll(async () => (await made()).length, { timeout: 60_000 }).toBe(times);
    expect(await page.inputValue('#file')).toBe('');
  }
  const held = await page.evaluate(
    async urls =>
      Promise.all(
        urls.map(url =>
          fetch(url).then(
            () => true,
            () => false,
          ),
        ),
      ),
    await made(),
  );
  expect(held).toEqual([false, true]);
  await page.context().close();
  await server.stop();
});

test('the page works by keyboard alone, and every control has a name', async () => {
  const server = await TestServer.start({ '/': BUILT, '/bundle/': folders.bundle() });
  const page = await visitor();
  await page.goto(server.url);
  await page.waitForSelector('#facts:not([hidden])');
  await page.keyboard.press('Tab');
  expect(await page.evaluate(() => document.activeElement?.id)).toBe('file');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Enter'); // the first example
  await page.waitForFunction(() => /\d/.test(document.getElementById('fact-speed')!.textContent!));
  expect(await page.textContent('#caption')).toBe(captions[SAMPLE]!.q8!.text);
  for (const role of ['button', 'combobox', 'img', 'progressbar'] as const) {
    expect(await page.getByRole(role, { name: /^$/ }).count(), role).toBe(0);
  }
  await page.context().close();
  await server.stop();
});

test('an error is shown with its hint', async () => {
  const server = await TestServer.start({ '/': BUILT });
  const page = await visitor();
  await page.goto(`${server.url}?model=/elsewhere/`);
  await page.waitForSelector('#error:not([hidden])');
  expect(await page.textContent('#error-message')).toMatch(/vlmport\.json.* 404/);
  expect(await page.textContent('#error-hint')).toMatch(/bundle/);
  expect(await page.isVisible('#again')).toBe(true);
  await page.context().close();
  await server.stop();
});

test('a model that answers questions has a field for them, and a captioner has none', async () => {
  const server = await TestServer.start({
    '/': BUILT,
    '/bundle/': folders.bundle(),
    '/tiles/': folders.tiles(),
  });
  const page = await visitor({ viewport: { width: 360, height: 480 } });
  await page.goto(`${server.url}?device=wasm`);
  await page.waitForSelector('#facts:not([hidden])');
  expect(await page.isHidden('#ask')).toBe(true);
  await page.goto(`${server.url}?device=wasm&model=/tiles/`);
  await page.waitForSelector('#facts:not([hidden])');
  await page.click('#samples button');
  await page.waitForFunction(() => document.getElementById('caption')!.textContent !== '');
  const question = 'What is it? '.repeat(50).trim(); // longer than the visible part of the talk
  await page.fill('#question', question); // in the middle of the caption, perhaps
  await page.keyboard.press('Enter');
  await page.waitForSelector('.answered:not(:empty)');
  expect(await page.textContent('.asked')).toBe(question);
  expect(await page.inputValue('#question')).toBe('');
  await page.waitForFunction(() => !document.querySelector('.writing'));
  expect(await page.textContent('#fact-first')).toMatch(/ms$/);
  expect(await page.isHidden('#error')).toBe(true);
  const overflows = await page.evaluate(() =>
    ['#talk', '.asked', '.answered'].map(name => {
      const { clientHeight, scrollHeight } = document.querySelector(name)!;
      return scrollHeight > clientHeight;
    }),
  );
  expect(overflows).toEqual([true, false, false]); // the talk scrolls, and bubbles fit
  await page.click('#samples button:nth-child(2)'); // another image begins another conversation
  expect(await page.locator('#talk li').count()).toBe(0);
  await page.context().close();
  await server.stop();
});
