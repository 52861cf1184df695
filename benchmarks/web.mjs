// Captions one picture again and again in Chromium and prints what it took, as one JSON object.
//
//   node web.mjs URL '{"client": "vlmport", "device": "wasm", "precision": "q8", "threads": 2, …}'
//
// `web.py` starts this, and the server of the page at URL.

import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const { chromium } = createRequire(new URL('../web/package.json', import.meta.url))(
  'playwright-core',
);
const [url, asked] = process.argv.slice(2);
const task = JSON.parse(asked);

/** Runs in the page: this package. */
async function vlmport({ device, precision, threads, picture, photo, repeats, bundle }) {
  const { vlmport } = globalThis;
  const start = performance.now();
  const vlm = await vlmport.VLM.load(bundle, { device, precision, threads });
  const load = performance.now() - start;
  if (repeats === null) return { load, runs: [], photos: [], reason: vlm.reason };
  const runs = [];
  for (let i = -1; i < repeats; i++) {
    vlm.forgetImages(); // else its features are known the second time
    const { timings, tokenIds, text } = await vlm.caption(picture);
    const first = 1000 * (timings.image + timings.prefill);
    const perSecond = (tokenIds.length - 1) / timings.decode;
    if (i >= 0) runs.push({ first, perSecond, tokens: tokenIds.length, text });
  }
  const photos = [];
  for (let i = -1; photo && i < repeats; i++) {
    vlm.forgetImages();
    const { timings } = await vlm.caption(photo, { maxNewTokens: 1 });
    if (i >= 0) photos.push(1000 * timings.image);
  }
  return { load, runs, photos, reason: vlm.reason };
}

/** Runs in the page: transformers.js, which the page's import map names. */
async function transformers({ device, precision, threads, picture, repeats }) {
  const { AutoModelForImageTextToText, AutoProcessor, RawImage, env } =
    await import('@huggingface/transformers');
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = '/';
  env.backends.onnx.wasm.wasmPaths = new URL('/tjs/', location.href).href;
  env.backends.onnx.wasm.numThreads = threads;
  const start = performance.now();
  const processor = await AutoProcessor.from_pretrained('bundle');
  const model = await AutoModelForImageTextToText.from_pretrained('bundle', {
    device,
    dtype: precision,
  });
  const load = performance.now() - start;
  const prompt = processor.apply_chat_template([{ role: 'user', content: [{ type: 'image' }] }], {
    add_generation_prompt: true,
  });
  const runs = [];
  for (let i = -1; i < repeats; i++) {
    const begin = performance.now();
    const inputs = await processor(await RawImage.read(picture), prompt);
    const times = [];
    const streamer = { put: () => times.push(performance.now()), end() {} };
    const output = await model.generate({ ...inputs, do_sample: false, streamer });
    const [, first, last] = [times[0], times[1], times.at(-1)]; // the prompt comes first
    const ids = output.tolist()[0].slice(inputs.input_ids.dims[1]);
    const perSecond = (1000 * (ids.length - 1)) / (last - first);
    const text = processor.decode(ids, { skip_special_tokens: true });
    if (i >= 0) runs.push({ first: first - begin, perSecond, tokens: ids.length, text });
  }
  return { load, runs, photos: [], reason: null };
}

/** Bytes that the page's process held at its peak. */
async function peakMemory(browser) {
  const session = await browser.newBrowserCDPSession();
  const { processInfo } = await session.send('SystemInfo.getProcessInfo');
  const peaks = processInfo
    .filter(one => one.type === 'renderer')
    .map(one => /VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${one.id}/status`, 'utf8'))?.[1] ?? 0);
  return 1024 * Math.max(...peaks.map(Number));
}

const found = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'];
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? found.find(existsSync),
  args: [
    ...['--no-sandbox', '--disable-background-networking', '--disable-component-update'],
    ...['--disable-sync', '--no-first-run', '--enable-unsafe-webgpu'],
    ...(task.device === 'webgpu' ? ['--use-webgpu-adapter=swiftshader'] : []),
  ],
});
const page = await browser.newPage();
await page.goto(url);
await page.waitForFunction(() => 'vlmport' in globalThis);
const answer = await page.evaluate(task.client === 'vlmport' ? vlmport : transformers, task);
const peak = existsSync('/proc/self/status') ? await peakMemory(browser) : null;
console.log(JSON.stringify({ ...answer, peak, browser: browser.version() }));
await browser.close();
