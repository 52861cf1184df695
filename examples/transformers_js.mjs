// Ask about an image with an unmodified transformers.js, offline, from a bundle's folder.
//
//   npm install @huggingface/transformers@4.3.2
//   node transformers_js.mjs my-bundle photo.png "what color is the square?" q8
//
// The bundle's model must answer questions. In a web page the code is the same; there a bundle's
// address or its id on the Hub takes the place of the folder.

import path from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers";

const [folder, picture, question, dtype = "q8"] = process.argv.slice(2);
if (!question) {
  console.error("usage: node transformers_js.mjs BUNDLE IMAGE QUESTION [fp32|q8|q4]");
  process.exit(2);
}
env.allowRemoteModels = false; // everything is in the folder

const bundle = path.resolve(folder);
const processor = await AutoProcessor.from_pretrained(bundle);
const model = await AutoModelForImageTextToText.from_pretrained(bundle, { dtype });

const content = [{ type: "image" }, { type: "text", text: question }];
const prompt = processor.apply_chat_template([{ role: "user", content }], {
  add_generation_prompt: true,
});
const inputs = await processor(prompt, await RawImage.read(picture));
const output = await model.generate({ ...inputs, max_new_tokens: 64 });
const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0].trim());
