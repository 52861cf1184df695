/**
 * The graphs of a bundle as functions (the twin of vlmport/runtime/components.py).
 *
 * What a graph is called with follows its own inputs. Whoever gets a tensor from here owns it.
 */

import { type BundleFiles, letGo } from '../bundle/download.js';
import type { Golden, ImageOptions, Manifest } from '../bundle/manifest.js';
import { type Choice, precisionName, variantOf } from '../bundle/precisions.js';
import { VlmportError, firstLine } from '../errors.js';
import type { Rgb } from './images.js';
import type { Runtime, Session, Tensor, TensorData, TensorType } from './sessions.js';
import { type Rows, joined, mergeImageFeatures, rowsOf } from './rows.js';
import { scalar, slices } from './slices.js';
import { nextTask } from './tasks.js';

const IMAGE = 'image_processor';
const VISION = 'vision_encoder';
const EMBED = 'embed_tokens';
const POSITIONS = 'position_ids';
const DECODER = 'decoder_model_merged';
const TILES = 'num_images'; // the axis of the vision encoder's inputs whose indices are independent
const USED = [IMAGE, VISION, EMBED, DECODER];

export type Feeds = Record<string, Tensor>;

/** What the image processor makes of one picture. `dispose` frees the inputs. */
export interface ProcessedImage {
  readonly inputs: Feeds;
  readonly promptIds: number[];
}

/** One cache tensor: its input, its output, and the sizes that never change. */
export interface CachePort {
  readonly past: string;
  readonly present: string;
  readonly heads: number;
  readonly headDim: number;
  readonly type: TensorType;
}

/** The decoder's session and what its inputs and outputs are. */
export interface Decoder {
  readonly session: Session;
  readonly ports: readonly CachePort[];
  readonly inputs: ReadonlySet<string>;
  readonly positionsRank: number; // 2: [B, S]; 3: [3, B, S]
}

/** The files of the chosen graphs, the largest graph first: so that the peak of memory is small. */
export function graphFiles(
  manifest: Manifest,
  choice: Choice,
): { name: string; paths: string[] }[] {
  const size = (paths: string[]) =>
    paths.reduce((sum, path) => sum + (manifest.files[path]?.size ?? 0), 0);
  return USED.map(name => {
    const { model, data } = variantOf(manifest, choice, name);
    return { name, paths: [model, ...data] };
  }).sort((a, b) => size(b.paths) - size(a.paths));
}

export class Components {
  readonly decoder: Decoder;

  private constructor(
    readonly runtime: Runtime,
    readonly manifest: Manifest,
    readonly choice: Choice,
    private readonly sessions: ReadonlyMap<string, Session>,
  ) {
    this.decoder = decoderOf(this.session(DECODER), manifest);
  }

  /** Fetch and open the graphs, one after the other; a graph's bytes are let go before the next. */
  static async open(
    runtime: Runtime,
    files: BundleFiles,
    choice: Choice,
    onOpen: (name: string) => void,
  ): Promise<Components> {
    const { manifest } = files;
    if (POSITIONS in manifest.components) {
      const message = `this bundle computes its positions by ${POSITIONS}.onnx`;
      throw new VlmportError('BundleError', message, "this version of @vlmport/web can't run it");
    }
    const sessions = new Map<string, Session>();
    try {
      for (const { name, paths } of graphFiles(manifest, choice)) {
        sessions.set(name, await openGraph(runtime, files, name, paths, onOpen));
      }
      return new Components(runtime, manifest, choice, sessions);
    } catch (error) {
      await releaseAll(sessions);
      throw error;
    }
  }

  get precision(): string {
    return precisionName(this.choice);
  }

  dispose(): Promise<void> {
    return releaseAll(this.sessions);
  }

  tensor(type: 'int64' | 'float32' | 'uint8', data: TensorData, dims: readonly number[]): Tensor {
    return new this.runtime.ort.Tensor(type, data, dims);
  }

  /**
   * Resize, normalise and lay out one picture. `options` are further inputs of the graph; the
   * manifest's are taken where they say nothing. Throws ImageError where the graph refuses it.
   */
  async processImage(
    { width, height, data }: Rgb,
    options: ImageOptions = {},
  ): Promise<ProcessedImage> {
    const image = this.tensor('uint8', data, [height, width, 3]);
    const feeds = { image, ...this.optionFeeds({ ...this.manifest.image_options, ...options }) };
    try {
      const { prompt_ids, ...inputs } = await this.session(IMAGE).run(feeds);
      const promptIds = integers(prompt_ids);
      prompt_ids?.dispose();
      return { inputs, promptIds };
    } catch (error) {
      const message = `a picture of ${width}x${height} pixels can't be processed: ${firstLine(error)}`;
      throw new VlmportError('ImageError', message, 'is it extremely narrow?');
    } finally {
      Object.values(feeds).forEach(tensor => tensor.dispose());
    }
  }

  /** The image processor's options as tensors of the types that it takes. */
  private optionFeeds(options: ImageOptions): Feeds {
    const { inputMetadata } = this.session(IMAGE);
    return Object.fromEntries(
      Object.entries(options).map(([name, value]) => {
        const input = inputMetadata.find(one => one.name === name);
        if (input?.isTensor) return [name, scalar(this.runtime.ort, input.type, value)];
        const message = `${IMAGE}: no input '${name}', which image_options name`;
        throw new VlmportError('BundleError', message, 'export the bundle again');
      }),
    );
  }

  /**
   * What another program's processor has made of one picture. The ids that stand for it are those
   * of the golden picture: right where every picture takes the same.
   */
  async processValues(dims: readonly number[], data: Float32Array): Promise<ProcessedImage> {
    const { inputMetadata } = this.session(VISION);
    const [input] = inputMetadata;
    const shape = input?.isTensor ? input.shape : [];
    const fits = dims.length === shape.length && shape.every((n, i) => isName(n) || n === dims[i]);
    if (inputMetadata.length !== 1 || !fits || !input) {
      const wanted = inputMetadata.map(one => `${one.name} [${one.isTensor ? one.shape : ''}]`);
      const message = `pixel values [${dims}], but the vision encoder takes ${wanted.join(', ')}`;
      throw new VlmportError('ImageError', message, 'give the picture itself');
    }
    const { image, options } = this.manifest.golden;
    const { inputs, promptIds } = await this.processImage(goldenImage(image), options);
    Object.values(inputs).forEach(tensor => tensor.dispose());
    return { inputs: { [input.name]: this.tensor('float32', data, dims) }, promptIds };
  }

  /**
   * Image features [T, D] of the processor's output, which is disposed.
   *
   * Where every input has an axis named `num_images`, its indices (a picture's tiles) are run one
   * by one: all at once take many times the memory, and no abort would be heard for as long.
   */
  async encodeImage({ inputs }: ProcessedImage, signal: AbortSignal): Promise<Rows> {
    try {
      const session = this.session(VISION);
      const missing = session.inputNames.find(name => !(name in inputs));
      if (missing !== undefined) {
        const message = `${VISION}: input '${missing}' is not made by the image processor`;
        throw new VlmportError('BundleError', message, 'export the bundle again');
      }
      const feeds = Object.fromEntries(session.inputNames.map(name => [name, inputs[name]!]));
      const parts: Rows[] = [];
      for (const part of slices(this.runtime.ort, session.inputMetadata, feeds, TILES)) {
        try {
          parts.push(await rowsOf((await this.run(VISION, part)).image_features));
        } finally {
          Object.values(part).forEach(tensor => tensor.dispose());
        }
        await nextTask();
        signal.throwIfAborted();
      }
      return joined(parts);
    } finally {
      Object.values(inputs).forEach(tensor => tensor.dispose());
    }
  }

  /** Rows of the embedding table: a tensor [1, S, D], on the device. */
  async embed(ids: readonly number[]): Promise<Tensor> {
    const input_ids = this.tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
    try {
      const { inputs_embeds } = await this.run(EMBED, { input_ids });
      if (inputs_embeds !== undefined) return inputs_embeds;
    } finally {
      input_ids.dispose();
    }
    throw new VlmportError('BundleError', `${EMBED}: no inputs_embeds`, 'export the bundle again');
  }

  /** A prompt's embeddings [1, S, D] with features, in order, over its image tokens' rows. */
  async embedPrompt(ids: readonly number[], features: readonly Rows[]): Promise<Tensor> {
    const embeds = await rowsOf(await this.embed(ids));
    const merged = mergeImageFeatures(embeds, ids, features, this.manifest.prompt.image_token_id);
    return this.tensor('float32', merged, [1, embeds.count, embeds.width]);
  }

  /** Run the decoder. The caller owns what it gets, and what it gave. */
  async decode(feeds: Feeds, fetches?: Record<string, Tensor | null>): Promise<Feeds> {
    return this.run(DECODER, feeds, fetches);
  }

  private async run(
    name: string,
    feeds: Feeds,
    fetches?: Record<string, Tensor | null>,
  ): Promise<Feeds> {
    const session = this.session(name);
    try {
      return await (fetches ? session.run(feeds, fetches) : session.run(feeds));
    } catch (error) {
      const { device } = this.runtime;
      const message = `${name} can't run on ${device}: ${firstLine(error)}`;
      throw new VlmportError('DeviceError', message, 'another device or precision may work');
    }
  }

  private session(name: string): Session {
    const session = this.sessions.get(name);
    if (session) return session;
    throw new VlmportError('BundleError', `this bundle has no ${name}`, 'export the bundle again');
  }
}

async function openGraph(
  runtime: Runtime,
  files: BundleFiles,
  name: string,
  paths: readonly string[],
  onOpen: (name: string) => void,
): Promise<Session> {
  const [model = '', ...data] = paths;
  const folder = model.slice(0, model.lastIndexOf('/') + 1); // data lies in it or below
  const external = [];
  for (const path of data) {
    external.push({ path: path.slice(folder.length), data: await files.read(path) });
  }
  const bytes = await files.read(model);
  onOpen(name);
  try {
    // The processor's exact integers belong on the host; embeddings go from step to step on the GPU.
    return await runtime.open(name, bytes, external, {
      onHost: name === IMAGE,
      onGpu: name === EMBED ? ['inputs_embeds'] : [],
    });
  } finally {
    for (const one of [bytes, ...external.map(({ data }) => data)]) letGo(one.buffer);
  }
}

async function releaseAll(sessions: ReadonlyMap<string, Session>): Promise<void> {
  for (const session of sessions.values()) await session.release();
}

/** The golden picture's pixels. */
export function goldenImage({ width, height, rgb }: Golden['image']): Rgb {
  const data = Uint8Array.from(atob(rgb), letter => letter.charCodeAt(0));
  if (data.length === width * height * 3) return { width, height, data };
  const message = `golden.image: not ${height}x${width}x3 bytes`;
  throw new VlmportError('BundleError', message, 'export the bundle again');
}

/** Pair cache inputs and outputs by name. Throws BundleError where one has no partner. */
function decoderOf(session: Session, manifest: Manifest): Decoder {
  const again = 'export the bundle again';
  const { past, present } = manifest.cache;
  const outputs = new Set(session.outputNames);
  const ports = session.inputMetadata.flatMap((input): CachePort[] => {
    if (!input.name.startsWith(past)) return [];
    const partner = present + input.name.slice(past.length);
    const [heads, headDim] = input.isTensor ? [input.shape[1], input.shape[3]] : [];
    if (!outputs.has(partner) || !input.isTensor || !isSize(heads) || !isSize(headDim)) {
      const message = `${DECODER}: ${input.name} has no partner, or no fixed sizes`;
      throw new VlmportError('BundleError', message, again);
    }
    return [{ past: input.name, present: partner, heads, headDim, type: input.type }];
  });
  const inputs = new Set(session.inputNames);
  if (!ports.length || !outputs.has('logits') || !inputs.has('inputs_embeds')) {
    throw new VlmportError('BundleError', `${DECODER}: no cache, logits or inputs_embeds`, again);
  }
  const positions = session.inputMetadata.find(one => one.name === 'position_ids');
  return {
    session,
    ports,
    inputs,
    positionsRank: positions?.isTensor ? positions.shape.length : 2,
  };
}

const isName = (size: number | string) => typeof size === 'string';
const isSize = (size: unknown): size is number => typeof size === 'number' && size > 0;

function integers(tensor: Tensor | undefined): number[] {
  const data = tensor?.data;
  if (data instanceof BigInt64Array) return Array.from(data, Number);
  throw new VlmportError('BundleError', `${IMAGE}: no prompt_ids`, 'export the bundle again');
}
