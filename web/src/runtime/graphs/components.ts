/**
 * The graphs of a bundle as functions (the twin of vlmport/runtime/graphs/components.py).
 *
 * A graph gets the inputs that it names itself. The caller owns, and disposes, each returned
 * tensor.
 */

import { type BundleFiles, freeNow } from '../../bundle/download.js';
import type { ImageOptions, Manifest } from '../../bundle/manifest.js';
import { type Choice, precisionName, variantOf } from '../../bundle/precisions.js';
import { VlmportError, firstLine } from '../../errors.js';
import { goldenImage } from '../golden.js';
import type { EncodedImage } from '../images/features.js';
import type { Rgb } from '../images/reading.js';
import { nextTask } from '../tasks.js';
import { type Decoder, decoderOf, scalesByCall } from './decoder.js';
import { checkIds, tableRows } from './embedding.js';
import { IMAGE, type ProcessedImage, optionFeeds, processImage } from './image-processor.js';
import { POSITIONS, type Positions, computed, counted } from './positions.js';
import { type Rows, joined, mergeImageFeatures, rowsOf } from './rows.js';
import type { Feeds, Runtime, Session, Tensor, TensorData } from './sessions.js';
import { slices } from './slices.js';

const VISION = 'vision_encoder';
const EMBED = 'embed_tokens';
const DECODER = 'decoder_model_merged';
const TILES = 'num_images'; // the axis of the vision encoder's inputs with independent indices
const USED = [IMAGE, VISION, EMBED, DECODER];
const ON_HOST = [IMAGE, POSITIONS]; // exact integers

/**
 * The decoder's inputs for a prompt, or for the end of one: embeddings [1, S, D], and positions.
 */
export interface PromptInputs {
  readonly embeds: Tensor;
  readonly positions: Positions;
}

/**
 * List the files of the chosen graphs, the largest graph first, which keeps the peak of memory low.
 */
export function graphFiles(
  manifest: Manifest,
  choice: Choice,
): { name: string; paths: string[] }[] {
  const size = (paths: string[]) =>
    paths.reduce((sum, path) => sum + (manifest.files[path]?.size ?? 0), 0);
  const used = [...USED, ...(POSITIONS in manifest.components ? [POSITIONS] : [])];
  return used
    .map(name => {
      const { model, data } = variantOf(manifest, choice, name);
      return { name, paths: [model, ...data] };
    })
    .sort((a, b) => size(b.paths) - size(a.paths));
}

export class Components {
  readonly decoder: Decoder;

  private constructor(
    readonly runtime: Runtime,
    readonly manifest: Manifest,
    readonly choice: Choice,
    private readonly sessions: ReadonlyMap<string, Session>,
    private readonly embeddingRows: number,
    rowByRow: boolean,
    private readonly textOf: (token: number) => string | undefined,
  ) {
    this.decoder = decoderOf(this.session(DECODER), manifest.cache, DECODER, rowByRow);
    const names = this.session(IMAGE).inputMetadata.map(one => one.name);
    const stray = Object.keys(manifest.image_options ?? {}).find(name => !names.includes(name));
    if (stray !== undefined) {
      const message = `${IMAGE}: no input '${stray}', but image_options has it`;
      throw new VlmportError(
        'BundleError',
        'bundle.wrong-graph',
        message,
        'export the bundle again',
      );
    }
  }

  /**
   * Fetch and open the graphs one after the other; the bytes of one are freed before the next.
   *
   * `textOf` returns a token's text, for errors.
   */
  static async open(
    runtime: Runtime,
    files: BundleFiles,
    choice: Choice,
    onOpen: (name: string) => void,
    textOf: (token: number) => string | undefined,
  ): Promise<Components> {
    const { manifest } = files;
    const sessions = new Map<string, Session>();
    let rows = Math.max(manifest.dims.vocab_size, manifest.prompt.image_token_id + 1);
    let rowByRow = false;
    const onBytes = (name: string, model: Uint8Array) => {
      if (name === EMBED) rows = tableRows(model, 'input_ids') ?? rows;
      if (name === DECODER) rowByRow = scalesByCall(model);
      onOpen(name);
    };
    try {
      for (const { name, paths } of graphFiles(manifest, choice)) {
        sessions.set(name, await openGraph(runtime, files, name, paths, onBytes));
      }
      return new Components(runtime, manifest, choice, sessions, rows, rowByRow, textOf);
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
   * Resize, normalise and lay out one image. `options` are further inputs of the graph; they
   * override the manifest's.
   *
   * Throws OptionError for an option that the graph does not have, ImageError where the graph
   * refuses the image, BundleError where it gives no prompt ids.
   */
  async processImage(rgb: Rgb, options: ImageOptions = {}): Promise<ProcessedImage> {
    const told = { ...this.manifest.image_options, ...options };
    return processImage(this.runtime.ort, this.session(IMAGE), rgb, told);
  }

  /**
   * Throws OptionError for an option that the image processor does not have, or of another type.
   */
  checkImageOptions(options: ImageOptions): void {
    const feeds = optionFeeds(this.runtime.ort, this.session(IMAGE), options);
    Object.values(feeds).forEach(tensor => tensor.dispose());
  }

  /**
   * Take pixel values that another program has made of one image. Its prompt ids are those of the
   * golden image, which is right for models where every image takes the same ids.
   */
  async processValues(dims: readonly number[], data: Float32Array): Promise<ProcessedImage> {
    const { inputMetadata } = this.session(VISION);
    const [input] = inputMetadata;
    const shape = input?.isTensor ? input.shape : [];
    const fits = dims.length === shape.length && shape.every((n, i) => isName(n) || n === dims[i]);
    if (inputMetadata.length !== 1 || !fits || !input) {
      const wanted = inputMetadata.map(one => `${one.name} [${one.isTensor ? one.shape : ''}]`);
      const message = `pixel values have the shape [${dims}], but the vision encoder takes ${wanted.join(', ')}`;
      throw new VlmportError('ImageError', 'image.wrong-array', message, 'give the image itself');
    }
    const { image, options } = this.manifest.golden;
    const { inputs, promptIds } = await this.processImage(goldenImage(image), options);
    Object.values(inputs).forEach(tensor => tensor.dispose());
    return { inputs: { [input.name]: this.tensor('float32', data, dims) }, promptIds };
  }

  /**
   * Encode the image processor's output to image features [T, D]. The inputs are not disposed.
   *
   * Where every input has an axis named `num_images`, its indices (the tiles of an image) are run
   * one by one: together they take many times the memory, and an abort waits until the end.
   */
  async encodeImage(inputs: Feeds, signal: AbortSignal): Promise<Rows> {
    const session = this.session(VISION);
    const missing = session.inputNames.find(name => !(name in inputs));
    if (missing !== undefined) {
      const message = `${VISION}: the image processor has no output '${missing}'`;
      throw new VlmportError(
        'BundleError',
        'bundle.wrong-graph',
        message,
        'export the bundle again',
      );
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
  }

  /** Select the outputs of the image processor that positions are computed from. */
  positionInputs(inputs: Feeds): Feeds {
    const wanted = this.sessions.get(POSITIONS)?.inputNames ?? [];
    return Object.fromEntries(Object.entries(inputs).filter(([name]) => wanted.includes(name)));
  }

  /** Throws PromptError for an id without an embedding. */
  checkIds(ids: readonly number[]): void {
    checkIds(ids, this.embeddingRows, this.textOf);
  }

  /**
   * Look up rows of the embedding table: a tensor [B, S, D], on the device. `dims` is [B, S]
   * (default [1, S]).
   *
   * Throws PromptError for an id outside it.
   */
  async embed(ids: readonly number[], dims: readonly number[] = [1, ids.length]): Promise<Tensor> {
    this.checkIds(ids);
    const input_ids = this.tensor('int64', BigInt64Array.from(ids, BigInt), dims);
    try {
      const { inputs_embeds } = await this.run(EMBED, { input_ids });
      if (inputs_embeds !== undefined) return inputs_embeds;
    } finally {
      input_ids.dispose();
    }
    throw new VlmportError(
      'BundleError',
      'bundle.wrong-graph',
      `${EMBED}: no inputs_embeds`,
      'export the bundle again',
    );
  }

  /**
   * Embed a prompt from its token `start` on: embeddings, with image features in order over the
   * rows of image tokens, and positions. The features of images before `start` are not used.
   */
  async embedPrompt(
    ids: readonly number[],
    images: readonly Pick<EncodedImage, 'features' | 'inputs'>[],
    start = 0,
  ): Promise<PromptInputs> {
    const token = this.manifest.prompt.image_token_id;
    const inputs = images.map(one => one.inputs);
    const { ids: positions, ropeDelta } = await this.positions(ids, inputs);
    const features = images.map(one => one.features);
    const past = ids.slice(0, start).filter(id => id === token).length;
    const embeds = await rowsOf(await this.embed(ids.slice(start)));
    const merged = mergeImageFeatures(embeds, ids.slice(start), features, token, past);
    return {
      embeds: this.tensor('float32', merged, [1, embeds.count, embeds.width]),
      positions: { ids: positions.map(row => row.slice(start)), ropeDelta },
    };
  }

  /** Compute the positions of a prompt: 0, 1, …, or those of the bundle's own graph. */
  private async positions(ids: readonly number[], images: readonly Feeds[]): Promise<Positions> {
    const session = this.sessions.get(POSITIONS);
    return session ? computed(this.runtime.ort, session, ids, images) : counted(ids);
  }

  /** Run the decoder. The caller owns both the inputs and the outputs. */
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
      throw new VlmportError(
        'DeviceError',
        'graph.run-failed',
        message,
        'try another device or precision',
      );
    }
  }

  private session(name: string): Session {
    const session = this.sessions.get(name);
    if (session) return session;
    throw new VlmportError(
      'BundleError',
      'bundle.malformed',
      `this bundle has no ${name}`,
      'export the bundle again',
    );
  }
}

async function openGraph(
  runtime: Runtime,
  files: BundleFiles,
  name: string,
  paths: readonly string[],
  onBytes: (name: string, model: Uint8Array) => void,
): Promise<Session> {
  const [model = '', ...data] = paths;
  const folder = model.slice(0, model.lastIndexOf('/') + 1); // the data files are in it or below
  const external = [];
  for (const path of data) {
    external.push({ path: path.slice(folder.length), data: await files.read(path) });
  }
  const bytes = await files.read(model);
  onBytes(name, bytes);
  try {
    // Embeddings stay on the GPU between the steps.
    return await runtime.open(name, bytes, external, {
      onHost: ON_HOST.includes(name),
      onGpu: name === EMBED ? ['inputs_embeds'] : [],
    });
  } finally {
    for (const one of [bytes, ...external.map(({ data }) => data)]) freeNow(one.buffer);
  }
}

async function releaseAll(sessions: ReadonlyMap<string, Session>): Promise<void> {
  for (const session of sessions.values()) await session.release();
}

const isName = (size: number | string) => typeof size === 'string';
