/** Parts that the browser tests share: the bundle, Python's results, Chromium, the page. */

import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { type Browser, type Page, chromium } from 'playwright-core';
import type * as Vlmport from '../src/index.js';
import type { Fed } from './page/counted.js';
import { TestServer } from './server.js';

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));

/** The results of Python's runtime, written by tests/web/test_web.py. */
export interface Expected {
  readonly precisions: readonly string[];
  /** Image → precision → tokens and text. */
  readonly captions: Readonly<
    Record<string, Readonly<Record<string, { tokens: number[]; text: string }>>>
  >;
  /** The same for a model that cuts images into tiles, with their number. */
  readonly tiles: Readonly<
    Record<string, { tokens: number[]; text: string; count: number; imageTokens: number }>
  >;
  /** Model → its conversations, by precision. */
  readonly talks: Readonly<Record<string, Talks>>;
  /** The image processor's output for the first image of `captions`. */
  readonly pixelValues: { readonly dims: readonly number[]; readonly data: readonly number[] };
  /** Image → size and SHA-256 of its RGB pixels. */
  readonly pixels: Readonly<Record<string, Pixels>>;
  /** Format and feature → the file's number, and the same or the code of Python's error. */
  readonly matrix: Readonly<
    Record<string, { readonly number: number } & (Pixels | { readonly code: string })>
  >;
}

interface Pixels {
  readonly width: number;
  readonly height: number;
  readonly sha256: string;
}

export interface Told {
  readonly tokens: number[];
  readonly text: string;
  readonly counts: Vlmport.Caption['counts'];
}

export interface Turn {
  readonly question: string | null;
  readonly pictures: readonly string[];
}

export interface Talks {
  /** The folder of its images on the server. */
  readonly folder: string;
  readonly system: string | null;
  readonly maxNewTokens: number | null;
  readonly said: Readonly<
    Record<
      string,
      {
        readonly turns: readonly (Turn & Told)[];
        readonly alone: readonly (Turn & Told)[];
        readonly messages: Told & {
          readonly messages: Vlmport.Message[];
          readonly pictures: readonly string[];
          readonly imageOptions: Vlmport.ImageOptions;
        };
      }
    >
  >;
}

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: run these tests by pytest tests/web`);
  return value;
}

export const folders = {
  bundle: () => setting('VLMPORT_WEB_BUNDLE'),
  pictures: () => setting('VLMPORT_WEB_PICTURES'), // the examples
  kinds: () => setting('VLMPORT_WEB_KINDS'), // small images of all kinds
  /** Bundles that answer questions, by name; 'tiles' cuts images into tiles. */
  talkers: () => JSON.parse(setting('VLMPORT_WEB_TALKERS')) as Record<string, string>,
  tiles: () => folders.talkers().tiles!,
  /** 'tiles' with a template that never ends: 'always', or where 'asked' for it. */
  endless: () => JSON.parse(setting('VLMPORT_WEB_ENDLESS')) as Record<'always' | 'asked', string>,
  /** The modules of transformers.js, next to those of ONNX Runtime. */
  transformers: () => setting('VLMPORT_WEB_TRANSFORMERS'),
  page: here('built'),
  /** Small projects that use the packed package. */
  packed: () => ({ plain: setting('VLMPORT_WEB_PLAIN'), built: setting('VLMPORT_WEB_BUILT') }),
  /** The same architecture with tiny weights, and with 200 MB of weights. */
  sizes: () => ({
    tiny: setting('VLMPORT_WEB_TINY'),
    large: setting('VLMPORT_WEB_LARGE'),
  }),
};

/** Whether this is `make verify-all`, which runs what the suite leaves out (tests/thorough.py). */
export const thorough = Boolean(process.env.VLMPORT_THOROUGH);

export const expected = () =>
  JSON.parse(readFileSync(setting('VLMPORT_WEB_EXPECTED'), 'utf8')) as Expected;

export function startServer(extra: Readonly<Record<string, string>> = {}, port = 0) {
  const roots = {
    '/': folders.page,
    '/bundle/': folders.bundle(),
    '/pictures/': folders.pictures(),
    '/kinds/': folders.kinds(),
    ...extra,
  };
  return TestServer.start(roots, port);
}

const CHROMIUM = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'];
const QUIET = [
  '--no-sandbox',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--no-first-run',
];
const WEBGPU = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader'];

export function launch({ webgpu = false, args = [] as string[] } = {}): Promise<Browser> {
  const executablePath = process.env.CHROMIUM ?? CHROMIUM.find(existsSync);
  if (!executablePath) throw new Error('no Chromium: apt-get install chromium, or set CHROMIUM');
  return chromium.launch({
    executablePath,
    args: [...QUIET, ...(webgpu ? WEBGPU : ['--disable-features=WebGPU']), ...args],
  });
}

/** Make the roots of a server: each talking model under its name. */
export const talkers = () =>
  Object.fromEntries(Object.entries(folders.talkers()).map(([name, at]) => [`/${name}/`, at]));

/** Open a new page of the tests' server, with the package loaded. */
export async function openPage(browser: Browser, url: string): Promise<Page> {
  const page = await (await browser.newContext()).newPage();
  page.setDefaultTimeout(120_000);
  if (process.env.VERBOSE) page.on('console', message => console.log(message.text()));
  await page.goto(url);
  await page.waitForFunction(() => 'vlmport' in globalThis);
  return page;
}

/** The globals of a page of `openCounted`. */
export interface CountedPage {
  readonly vlmport: typeof Vlmport;
  /** Return the inputs of ONNX Runtime's runs so far, and remove them. */
  readonly forgetRuns: () => Promise<Fed[]>;
}

/** Open a page that records the inputs of ONNX Runtime in its one worker. */
export async function openCounted(browser: Browser, server: TestServer): Promise<Page> {
  // An echo arrives after all earlier messages. ONNX Runtime's threads run this script too.
  server.workerPrelude = `
    const channel = new BroadcastChannel('runs');
    globalThis.onRun = fed => channel.postMessage(fed);
    if (!self.name.startsWith('em-pthread')) {
      channel.onmessage = ({ data }) => channel.postMessage(data);
    }`;
  const page = await openPage(browser, server.url);
  await page.evaluate(() => {
    const channel = new BroadcastChannel('runs');
    const runs: Fed[] = [];
    const waiting = new Map<string, (runs: Fed[]) => void>();
    channel.onmessage = ({ data }: MessageEvent<Fed | string>) => {
      if (typeof data === 'string') waiting.get(data)?.(runs.splice(0));
      else runs.push(data);
    };
    const forgetRuns = () =>
      new Promise<Fed[]>(resolve => {
        const echo = crypto.randomUUID();
        waiting.set(echo, resolve);
        channel.postMessage(echo);
      });
    Object.assign(globalThis, { forgetRuns });
  });
  return page;
}

/** The task of a test in the page, as plain data. */
export interface Asking {
  readonly url?: string;
  readonly options?: {
    readonly device?: 'auto' | 'webgpu' | 'wasm';
    readonly precision?: string;
    readonly threads?: number;
  };
  readonly pictures?: readonly string[];
  readonly maxNewTokens?: number;
}

export interface Answer {
  readonly device: string;
  readonly precision: string;
  readonly threads: number;
  readonly reason: string | null;
  readonly notes: readonly string[];
  readonly tokens: readonly (readonly number[])[];
  readonly texts: readonly string[];
  readonly streamed: readonly string[];
  readonly progress: readonly { phase: string; loadedBytes: number; totalBytes: number }[];
}

/** Load the bundle in the page, and caption the images piece by piece. */
export function ask(page: Page, asking: Asking = {}): Promise<Answer> {
  return page.evaluate(async (asking: Asking) => {
    const { url = '/bundle/', options = {}, pictures = [], maxNewTokens } = asking;
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const progress: Vlmport.Progress[] = [];
    const vlm = await VLM.load(url, { ...options, onProgress: one => progress.push(one) });
    const [tokens, texts, streamed]: [number[][], string[], string[]] = [[], [], []];
    for (const picture of pictures) {
      const pieces = vlm.stream(picture, maxNewTokens ? { maxNewTokens } : {});
      let text = '';
      let next = await pieces.next();
      for (; !next.done; next = await pieces.next()) text += next.value;
      streamed.push(text);
      tokens.push([...next.value.tokenIds]);
      texts.push(next.value.text);
    }
    const { device, precision, threads, reason, notes } = vlm;
    vlm.dispose();
    return { device, precision, threads, reason, notes, tokens, texts, streamed, progress };
  }, asking);
}

/** Return the error that a call in the page ends with. */
export async function refusal(
  page: Page,
  asking: Asking,
): Promise<{ kind: string; code: string; message: string; hint: string }> {
  return page.evaluate(async ({ url = '/bundle/', options = {}, pictures = [] }: Asking) => {
    const { VLM, VlmportError } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    try {
      const vlm = await VLM.load(url, options);
      for (const picture of pictures) await vlm.caption(picture);
      vlm.dispose();
      return { kind: 'none', code: 'none', message: '', hint: '' };
    } catch (error) {
      if (!(error instanceof VlmportError)) throw error;
      return error.toPlain();
    }
  }, asking);
}
