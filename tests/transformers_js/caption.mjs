// Captions pictures with an unmodified transformers.js and prints one JSON object.
//
//   node caption.mjs BUNDLE [--dtype q4] [--pixels FILE] PICTURE...
//
// Each picture is captioned alone and, where there are several, all in one batch: with the
// client's own preprocessing ("own") and, with --pixels, with that file's pixel_values, float32
// [pictures, 3, H, W] in native byte order, in its place ("fed"). Without --dtype the client
// takes what config.json names. Every attempt to reach a network is refused and reported.

import { readFile } from "node:fs/promises";
import net from "node:net";
import path from "node:path";
import { parseArgs } from "node:util";

const network = [];
const messages = [];

function refuse(where) {
  return (...args) => {
    network.push(`${where} ${String(args[0]?.url ?? args[0]?.host ?? args[0])}`);
    throw new Error(`${where}: this test allows no network`);
  };
}

// Before the client is loaded: it keeps the fetch that it finds then.
globalThis.fetch = refuse("fetch");
net.Socket.prototype.connect = refuse("connect");
for (const level of ["debug", "info", "log", "warn", "error"]) {
  console[level] = (...args) => messages.push(`${level}: ${args.join(" ")}`);
}

const { AutoModelForImageTextToText, AutoProcessor, ModelRegistry, RawImage, Tensor, env } =
  await import("@huggingface/transformers");
env.allowRemoteModels = false;
env.useFSCache = false;

const CAPTION = [{ role: "user", content: [{ type: "image" }] }];

/** Ids up to the first stop token: a batch goes on until its last row has stopped. */
function untilStop(ids, stops) {
  const end = ids.findIndex((id) => stops.includes(id));
  return end < 0 ? ids : ids.slice(0, end + 1);
}

/** pixel_values of some of the pictures in a raw file. */
function pixelRows(values, size, rows) {
  const count = 3 * size.height * size.width;
  const data = new Float32Array(rows.length * count);
  rows.forEach((row, i) => data.set(values.subarray(row * count, (row + 1) * count), i * count));
  return new Tensor("float32", data, [rows.length, 3, size.height, size.width]);
}

/** Greedy captions of pictures in one batch: [{ids, text}]. */
async function caption(model, processor, images, pixelValues) {
  const prompt = processor.apply_chat_template(CAPTION, { add_generation_prompt: true });
  const inputs = await processor(
    images,
    images.map(() => prompt),
  );
  if (pixelValues) inputs.pixel_values = pixelValues;
  const output = await model.generate(inputs);
  const stops = [model.generation_config.eos_token_id].flat();
  return output.tolist().map((row) => {
    const ids = row.slice(inputs.input_ids.dims[1]).map(Number);
    const kept = untilStop(ids, stops);
    return { ids: kept, text: processor.decode(kept, { skip_special_tokens: true }) };
  });
}

/** The captions of every picture alone, and of all in one batch. */
async function captionAll(model, processor, images, pixels) {
  const alone = [];
  for (const [i, image] of images.entries()) {
    alone.push(...(await caption(model, processor, [image], pixels?.([i]))));
  }
  const rows = [...images.keys()];
  const batch = await caption(model, processor, images, pixels?.(rows));
  return { alone, batch };
}

const { values: options, positionals } = parseArgs({
  options: { dtype: { type: "string" }, pixels: { type: "string" } },
  allowPositionals: true,
});
const [folder, ...pictures] = positionals;
const bundle = path.resolve(folder);

const processor = await AutoProcessor.from_pretrained(bundle);
const model = await AutoModelForImageTextToText.from_pretrained(bundle, {
  ...(options.dtype && { dtype: options.dtype }),
  session_options: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const images = await Promise.all(pictures.map((picture) => RawImage.read(picture)));
const result = { own: await captionAll(model, processor, images) };
if (options.pixels) {
  const { buffer } = new Uint8Array(await readFile(options.pixels));
  const values = new Float32Array(buffer);
  const { size } = processor.image_processor;
  result.fed = await captionAll(model, processor, images, (rows) => pixelRows(values, size, rows));
}
const dtypes = Object.entries(model.sessions).map(([name, { config }]) => [name, config.dtype]);
const files = await ModelRegistry.get_model_files(bundle, { dtype: Object.fromEntries(dtypes) });
await model.dispose();
process.stdout.write(
  JSON.stringify({
    class: model.constructor.name,
    version: env.version,
    dtypes: Object.fromEntries(dtypes),
    files,
    ...result,
    messages,
    network,
  }),
);
