import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { parseManifest } from '../src/bundle/manifest.js';
import { choose, precisionName } from '../src/bundle/precisions.js';
import { type Json, firstProblem } from '../src/bundle/schema.js';
import { VlmportError } from '../src/errors.js';
import schema from '../src/bundle/vlmport.schema.json' with { type: 'json' };

const hash = 'ab'.repeat(32);
const names = ['vision_encoder', 'embed_tokens', 'decoder_model_merged'];

/** Make a manifest of two precisions; `change` modifies it. */
function manifest(change: (raw: ReturnType<typeof whole>) => void = () => {}): string {
  const raw = whole();
  change(raw);
  return JSON.stringify(raw);
}

function whole() {
  const variant = (model: string) => ({ model, data: [] as string[] });
  const files: Record<string, { size: number; sha256: string; chunks: string[] }> = {};
  const components: Record<string, Record<string, { model: string; data: string[] }>> = {
    image_processor: { any: variant('onnx/image_processor.onnx') },
  };
  for (const name of names) {
    components[name] = { fp32: variant(`onnx/${name}.onnx`), q4: variant(`onnx/${name}_q4.onnx`) };
  }
  for (const forms of Object.values(components)) {
    for (const { model } of Object.values(forms)) {
      files[model] = { size: 10, sha256: hash, chunks: [hash] };
    }
  }
  const auto = (one: string) => Object.fromEntries(names.map(name => [name, one]));
  return {
    format: 'vlmport',
    version: 1,
    producer: 'a test',
    name: 'tiny',
    family: 'prefix',
    components,
    auto: { cpu: auto('fp32'), webgpu: auto('q4') } as Record<string, Record<string, string>>,
    files,
    dims: {
      hidden_size: 8,
      num_hidden_layers: 1,
      num_key_value_heads: 1,
      head_dim: 8,
      vocab_size: 9,
      context_length: 64,
    },
    cache: { past: 'past.', present: 'present.', axes: ['b', 'h', 's', 'd'] },
    prompt: {
      image_placeholder: '<image>',
      placeholder_token_id: 8,
      image_token_id: 8,
      caption: [{ role: 'user', content: [{ type: 'image' }] }],
    },
    generation: {
      stop_token_ids: [0],
      pad_token_id: 0,
      max_new_tokens: 30,
      processors_see_prompt: false,
      defaults: {},
    },
    pixels: { resample: 'bicubic', equals: 'Pillow 13' },
    golden: {
      image: { width: 1, height: 1, rgb: 'AAAA' },
      copies: 1,
      prefill_tokens: 64,
      expected: {},
    },
    parity: null,
  };
}

test('the schema is the one of Python, except for descriptions', () => {
  const read = (path: string) => {
    const text = readFileSync(new URL(path, import.meta.url), 'utf8');
    return JSON.parse(text, (key, value) => (key === 'description' ? undefined : value));
  };
  const ours = read('../src/bundle/vlmport.schema.json');
  expect(ours).toEqual(read('../../src/vlmport/bundle/vlmport.schema.json'));
});

test('a valid manifest is read', () => {
  expect(parseManifest(manifest(), 'here').name).toBe('tiny');
});

test.each<[string, (raw: ReturnType<typeof whole>) => void, RegExp]>([
  ['newer', raw => (raw.version = 2), /version 2\b.* 1$/],
  ['other format', raw => (raw.format = 'x'), /manifest\.format must be "vlmport"/],
  ['missing', raw => Reflect.deleteProperty(raw, 'golden'), /manifest\.golden is missing/],
  ['unknown', raw => Object.assign(raw, { more: 1 }), /manifest\.more is unknown/],
  ['type', raw => Object.assign(raw.dims, { head_dim: 1.5 }), /dims\.head_dim must be integer/],
  ['minimum', raw => (raw.golden.prefill_tokens = 63), /prefill_tokens must be at least 64/],
  ['twice', raw => raw.generation.stop_token_ids.push(0), /stop_token_ids has an item twice/],
  ['pattern', raw => (raw.components.image_processor!.any!.model = '../x'), /model must match/],
  ['up', raw => (raw.files['../x'] = raw.files['onnx/embed_tokens.onnx']!), /x is unknown/],
  ['enum', raw => (raw.pixels.resample = 'box'), /resample must be one of/],
  ['items', raw => raw.cache.axes.push('e'), /axes has too many items/],
  [
    'a name of JavaScript',
    raw => (raw.components.embed_tokens!.q4!.model = 'constructor'),
    /constructor is not in files/,
  ],
  ['unlisted', raw => delete raw.files['onnx/embed_tokens.onnx'], /onnx is not in files/],
  ['layout', raw => Object.assign(raw, { layout: 'components' }), /'components', expected 'hub'/],
  [
    'chunks',
    raw => (raw.files['onnx/embed_tokens.onnx']!.size = 9e6),
    /1 chunk hashes, expected 2/,
  ],
  [
    'a file of the reader',
    raw => Object.assign(raw.prompt.caption[0]!.content[0]!, { image: '/etc/passwd' }),
    /caption\[0\]\.content\[0\]\.image is unknown/,
  ],
  ['auto', raw => (raw.auto.cpu!.embed_tokens = 'q8'), /auto\.cpu: no embed_tokens in q8/],
])('%s: a wrong manifest is refused', (_, change, message) => {
  const version = /version 2/.test(message.source) && 'bundle.newer-version';
  const layout = /'components'/.test(message.source) && 'bundle.other-layout';
  const code = version || layout || 'bundle.malformed';
  const error = expect.objectContaining({ code, message: expect.stringMatching(message) });
  expect(() => parseManifest(manifest(change), 'here')).toThrow(error);
});

test('what is not JSON is refused', () => {
  expect(() => parseManifest('<html>', 'here')).toThrow(
    expect.objectContaining({ code: 'source.not-json' }),
  );
});

test('an unsupported schema keyword fails', () => {
  expect(() => firstProblem(1, { oneOf: [] }, 'x')).toThrow(/keyword oneOf/);
  const keywords = new Set<string>();
  const walk = (part: Json): void => {
    if (typeof part !== 'object' || part === null) return;
    for (const one of Object.values(part)) walk(one);
    Object.keys(part).forEach(key => keywords.add(key));
  };
  walk(schema as Json);
  expect(keywords.has('oneOf')).toBe(false);
});

function hintOf(attempt: () => unknown): string {
  try {
    attempt();
  } catch (error) {
    if (error instanceof VlmportError) return error.hint;
  }
  return 'no error of ours';
}

test('precisions: auto, one for all, a mix', () => {
  const read = parseManifest(manifest(), 'here');
  const named = (precision: string, device: string) =>
    precisionName(choose(read, precision, device));
  const absent = (name: string) =>
    expect.objectContaining({
      code: 'precision.not-in-bundle',
      message: expect.stringContaining(`'${name}'`),
    });
  expect(named('auto', 'webgpu')).toBe('q4');
  expect(named('auto', 'wasm')).toBe('fp32'); // the manifest has no entry: the CPU's is used
  expect(named('q4', 'wasm')).toBe('q4');
  expect(named('decoder=q4', 'wasm')).toBe(
    'vision_encoder=fp32,embed_tokens=fp32,decoder_model_merged=q4',
  );
  expect(() => named('q8', 'wasm')).toThrow(absent('q8'));
  expect(() => named('int8', 'wasm')).toThrow(absent('q8')); // its other name
  expect(() => named('vision=int8', 'wasm')).toThrow(/'q8' .* \(component vision_encoder\)/);
  expect(hintOf(() => named('q8', 'wasm'))).toMatch(/ fp32, q4; .* --precision fp32,q8,q4$/);
  expect(hintOf(() => named('x', 'wasm'))).toMatch(/ fp32, q4$/);
  expect(() => named('constructor', 'wasm')).toThrow(absent('constructor'));
  expect(() => named('constructor=q4', 'wasm')).toThrow(/no component 'constructor'/);
  expect(() => choose(read, 'q44', 'wasm')).toThrow(/'q44' .*did you mean 'q4'/);
  expect(() => choose(read, 'decode=q4', 'wasm')).toThrow(
    /no component 'decode' \(did you mean 'decoder'/,
  );
});
