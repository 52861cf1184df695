/** Images have the pixels that Python reads, from each type that a page has. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { sha256 } from '../src/bundle/sha256.js';
import type { openImage } from '../src/runtime/images/reading.js';
import type { TestServer } from './server.js';
import { expected, folders, launch, openPage, startServer } from './support.js';

/** The part of transformers.js's class that is used here. */
interface Raw extends Vlmport.RawImage {
  clone(): Raw;
  rgb(): Raw;
  rgba(): Raw;
  grayscale(): Raw;
}

interface Page_ {
  readonly vlmport: typeof Vlmport;
  readonly inside: { readonly openImage: typeof openImage; readonly sha256: typeof sha256 };
}

const { captions, pixels, matrix } = expected();
const picture = Object.keys(captions)[0]!;

let server: TestServer;
let browser: Browser;
let page: Page;
beforeAll(async () => {
  server = await startServer({ '/transformers/': folders.transformers() });
  browser = await launch();
  page = await openPage(browser, server.url);
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

test.each(Object.keys(pixels))('%s', async name => {
  const got = await page.evaluate(async name => {
    const { inside } = globalThis as unknown as Page_;
    const url = new URL(`/kinds/${name}`, location.href).href;
    const rgb = await inside.openImage({ kind: 'url', url }, new AbortController().signal);
    return { width: rgb.width, height: rgb.height, sha256: await inside.sha256(rgb.data) };
  }, name);
  expect(got).toEqual(pixels[name]);
});

/** Kinds that browsers read differently from Python, and that the package refuses. */
const REFUSED_HERE = {
  'avif alpha': 'image.no-exact-alpha',
  'bmp 16 bits': 'image.unsupported-format',
};

test('every format and feature gives the pixels of Python, or its error', async () => {
  const numbers = Object.values(matrix).map(({ number }) => number);
  const got = await page.evaluate(async numbers => {
    const { inside } = globalThis as unknown as Page_;
    const read = async (number: number) => {
      const blob = await (await fetch(`/kinds/matrix/${number}.bin`)).blob();
      try {
        const rgb = await inside.openImage({ kind: 'blob', blob }, new AbortController().signal);
        const { width, height } = rgb;
        return { number, width, height, sha256: await inside.sha256(rgb.data) };
      } catch (error) {
        return { number, code: (error as Vlmport.VlmportError).code };
      }
    };
    const found = [];
    for (const number of numbers) found.push(await read(number));
    return found;
  }, numbers);
  expect(numbers.length).toBeGreaterThan(130);
  for (const [i, [name, wanted]] of Object.entries(matrix).entries()) {
    const code = (REFUSED_HERE as Record<string, string>)[name];
    expect(got[i], name).toEqual(code ? { number: wanted.number, code } : wanted);
  }
});

test('a browser that changes the pixels of a canvas is detected', async () => {
  const fresh = await openPage(browser, server.url); // results of tests are kept in a page
  const codes = await fresh.evaluate(async () => {
    const { inside } = globalThis as unknown as Page_;
    const outcome = async (name: string) => {
      const url = new URL(`/kinds/${name}`, location.href).href;
      try {
        await inside.openImage({ kind: 'url', url }, new AbortController().signal);
        return 'read';
      } catch (error) {
        return (error as Vlmport.VlmportError).code;
      }
    };
    const context = OffscreenCanvasRenderingContext2D.prototype;
    const { getImageData } = context;
    context.getImageData = function (...area: Parameters<typeof getImageData>) {
      const found = getImageData.apply(this, area);
      found.data[5 % found.data.length]! ^= 1;
      return found;
    };
    const found = [await outcome('rgb.jpg')];
    context.getImageData = getImageData;
    found.push(await outcome('rgb.jpg')); // the user has allowed it
    const { readPixels } = WebGLRenderingContext.prototype;
    WebGLRenderingContext.prototype.readPixels = () => {};
    found.push(await outcome('half_transparent.png'));
    WebGLRenderingContext.prototype.readPixels = readPixels;
    found.push(await outcome('half_transparent.png'));
    return found;
  });
  await fresh.context().close();
  expect(codes).toEqual(['image.readback', 'read', 'image.no-exact-alpha', 'read']);
});

test('each type of source gives the same tokens', async () => {
  const tokens = await page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32', threads: 1 });
    const blob = await (await fetch(url)).blob();
    const bitmap = await createImageBitmap(blob);
    const { width, height } = bitmap;
    const image = new Image();
    image.src = url;
    const canvas = document.createElement('canvas');
    const offscreen = new OffscreenCanvas(width, height);
    [canvas.width, canvas.height] = [width, height];
    canvas.getContext('2d')!.drawImage(bitmap, 0, 0);
    const context = offscreen.getContext('2d')!;
    context.drawImage(bitmap, 0, 0);
    const imageData = context.getImageData(0, 0, width, height);
    const data = imageData.data.filter((_, i) => i % 4 !== 3);
    const sources = {
      blob,
      file: new File([blob], 'picture.png'),
      url,
      address: new URL(url, location.href),
      image,
      canvas,
      offscreen,
      imageData,
      bitmap,
      rawImage: { data, width, height, channels: 3 },
    };
    const found: Record<string, readonly number[]> = {};
    for (const [kind, source] of Object.entries(sources)) {
      found[kind] = (await vlm.caption(source)).tokenIds;
      found[`${kind} again`] = (await vlm.caption(source)).tokenIds; // it was not changed
    }
    vlm.dispose();
    return found;
  }, `/pictures/${picture}`);
  const wanted = captions[picture]!.fp32!.tokens;
  expect(Object.keys(tokens)).toHaveLength(20);
  for (const [kind, found] of Object.entries(tokens)) expect(found, kind).toEqual(wanted);
});

test("transformers.js's own RawImage, of each number of channels", async () => {
  // Its module imports ONNX Runtime, which does not run here.
  const empty = 'data:text/javascript,export const env={},Tensor=class{},InferenceSession={}';
  const imports = { 'onnxruntime-web/webgpu': empty, 'onnxruntime-common': empty };
  await page.addScriptTag({ type: 'importmap', content: JSON.stringify({ imports }) });
  const from = "'/transformers/transformers.web.js'";
  const content = `import { RawImage } from ${from}; Object.assign(globalThis, { RawImage });`;
  await page.addScriptTag({ type: 'module', content });
  await page.waitForFunction(() => 'RawImage' in globalThis);
  const found = await page.evaluate(async url => {
    const { RawImage } = globalThis as unknown as {
      RawImage: { read(url: string): Promise<Raw> };
    };
    const { VLM } = (globalThis as unknown as Page_).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'wasm', precision: 'fp32', threads: 1 });
    const raw = await RawImage.read(url);
    const forms = { read: raw, rgb: raw.clone().rgb(), rgba: raw.clone().rgba() };
    const tokens: Record<string, readonly number[]> = {};
    for (const [name, image] of Object.entries(forms)) {
      tokens[name] = (await vlm.caption(image)).tokenIds;
    }
    const gray = (await vlm.caption(raw.clone().grayscale())).tokenIds.length;
    vlm.dispose();
    return { tokens, gray, channels: raw.clone().grayscale().channels };
  }, `/pictures/${picture}`);
  const wanted = captions[picture]!.fp32!.tokens;
  expect(found.tokens).toEqual({ read: wanted, rgb: wanted, rgba: wanted });
  expect(found.channels).toBe(1);
  expect(found.gray).toBeGreaterThan(0);
});

test('a source that is not an image is refused', async () => {
  const errors = await page.evaluate(async () => {
    const { VLM, VlmportError } = (globalThis as unknown as Page_).vlmport;
    const options = { device: 'wasm', precision: 'fp32', threads: 1, imageCacheBytes: 0 } as const;
    const vlm = await VLM.load('/bundle/', options);
    const wrong: unknown[] = [
      new Blob(['<svg xmlns="http://www.w3.org/2000/svg"/>'], { type: 'image/svg+xml' }),
      new Blob([]),
      '/pictures/missing.png',
      location.href, // a web page
      42,
      { data: new Uint8Array(5), width: 2, height: 1, channels: 3 },
      { data: new Uint8Array(4), width: 2, height: 1, channels: 2 },
      { data: new Uint8Array(3 * 70_000), width: 70_000, height: 1, channels: 3 },
      new Image(),
      Object.create(null),
    ];
    const messages = [];
    const sized = VLM.load('/bundle/', { imageCacheBytes: -1 });
    messages.push(await sized.then(String, error => `imageCacheBytes: ${error.kind}`));
    for (const source of wrong) {
      try {
        await vlm.caption(source as string);
        messages.push('no error');
      } catch (error) {
        if (!(error instanceof VlmportError)) throw error;
        messages.push(`${error.kind}: ${error.code}`);
      }
    }
    vlm.dispose();
    return messages;
  });
  expect(errors).toEqual([
    'imageCacheBytes: OptionError',
    'ImageError: image.unsupported-format',
    'ImageError: image.empty',
    'ImageError: image.not-fetched',
    'ImageError: source.web-page',
    'ImageError: image.wrong-type',
    'ImageError: image.wrong-array',
    'ImageError: image.wrong-array',
    'ImageError: image.too-large',
    'ImageError: image.unreadable',
    'ImageError: image.wrong-type',
  ]);
});
