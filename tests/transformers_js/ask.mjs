// Answers one conversation with an unmodified transformers.js and prints one JSON object.
//
//   node ask.mjs BUNDLE < request.json
//
// The request: {dtype?, messages, pictures: [paths], split, pixels?, tokens}. `pixels` is a raw file
// of pixel_values, float32 [1, n, 3, side, side] in native byte order, that takes the place of the
// client's own. Every attempt to reach a network is refused.

import { readFile } from "node:fs/promises";
import net from "node:net";
import path from "node:path";
import { text } from "node:stream/consumers";

const messages = [];

function refuse(where) {
  return () => {
    throw new Error(`${where}: this test allows no network`);
  };
}

// Before the client is loaded: it keeps the fetch that it finds then.
globalThis.fetch = refuse("fetch");
net.Socket.prototype.connect = refuse("connect");
for (const level of ["debug", "info", "log", "warn", "error"]) {
  console[level] = (...args) => messages.push(`${level}: ${args.join(" ")}`);
}

const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } = await import(
  "@huggingface/transformers"
);
env.allowRemoteModels = false;
env.useFSCache = false;

/** The client's inputs. Its processor can't do without a picture, so text goes round it. */
async function inputsOf(processor, request) {
  const prompt = processor.apply_chat_template(request.messages, { add_generation_prompt: true });
  if (!request.pictures.length) {
    return processor.tokenizer(prompt, { add_special_tokens: false });
  }
  const images = await Promise.all(request.pictures.map((picture) => RawImage.read(picture)));
  return processor(prompt, images, { do_image_splitting: request.split });
}

/** A raw file as pixel_values of the shape that the client's own have. */
async function pixelsFrom(file, dims) {
  const { buffer } = new Uint8Array(await readFile(file));
  return new Tensor("float32", new Float32Array(buffer), dims);
}

const request = JSON.parse(await text(process.stdin));
const bundle = path.resolve(process.argv[2]);
const processor = await AutoProcessor.from_pretrained(bundle);
const model = await AutoModelForImageTextToText.from_pretrained(bundle, {
  ...(request.dtype && { dtype: request.dtype }),
  session_options: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const inputs = await inputsOf(processor, request);
if (request.pixels) {
  inputs.pixel_values = await pixelsFrom(request.pixels, inputs.pixel_values.dims);
}
const output = await model.generate({ ...inputs, max_new_tokens: request.tokens });
const ids = output.tolist()[0].map(Number);
const length = inputs.input_ids.dims[1];
const dtypes = Object.entries(model.sessions).map(([name, { config }]) => [name, config.dtype]);
await model.dispose();
process.stdout.write(
  JSON.stringify({
    class: model.constructor.name,
    dtypes: Object.fromEntries(dtypes),
    prompt: ids.slice(0, length),
    ids: ids.slice(length),
    pixels: inputs.pixel_values?.dims ?? null,
    messages,
  }),
);
