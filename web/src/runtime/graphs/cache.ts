/**
 * The key-value cache of one sequence (the twin of vlmport/runtime/graphs/cache.py).
 *
 * On the GPU, past and present are one buffer that a step writes in place. WebAssembly copies the
 * inputs and outputs of each run, so there the cache is never larger than the text.
 */

import { VlmportError } from '../../errors.js';
import type { Components } from './components.js';
import type { CachePort } from './decoder.js';
import { type Rows, rowsOf } from './rows.js';
import type { Feeds, Tensor } from './sessions.js';
import { firstOfAxis } from './slices.js';

const BYTES: Readonly<Record<string, number>> = { float32: 4, float16: 2 };

/**
 * Number of tokens of a prompt in one call of a decoder on the CPU, the same as in Python: an 8-bit
 * decoder scales activations by all rows of a call, so the last bits depend on it.
 */
const CHUNK = 192;

/**
 * List where the chunks of a prompt end. The last has at least half a chunk, or is the whole
 * prompt.
 */
export function cuts(length: number, chunk: number): number[] {
  const inner: number[] = [];
  for (let at = chunk; at < length - chunk / 2; at += chunk) inner.push(at);
  return [...inner, length];
}

/** Create the cache for the device, with room for `capacity` tokens at first. */
export function openCache(components: Components, capacity: number): KeyValueCache {
  return components.runtime.gpu === null
    ? new GrowingCache(components)
    : new BufferCache(components, components.runtime.gpu, capacity);
}

export abstract class KeyValueCache {
  /** The next position minus the number of tokens: 0, except for models whose images take fewer
   * positions than tokens. */
  ropeDelta = 0;
  protected tokens = 0;
  /** Number of tokens of a prompt in one call. */
  protected readonly chunk: number = Infinity;

  constructor(readonly components: Components) {}

  protected abstract run(feeds: Feeds): Promise<Tensor | undefined>;
  abstract dispose(): void;

  /** Make room for a sequence of `length` tokens; the contents stay. */
  abstract reserve(length: number): void;

  /** Remove all but the first `length` tokens. */
  abstract truncate(length: number): void;

  /** The number of tokens in the cache. */
  get length(): number {
    return this.tokens;
  }

  /**
   * Run embeddings [1, S, D] after the tokens in the cache, and return the logits of the last one.
   * Disposes `embeds`.
   *
   * `positions` has the positions of the new tokens, one row of S or three; without it they count
   * on.
   */
  async append(embeds: Tensor, positions?: readonly BigInt64Array[]): Promise<Float32Array> {
    const added = embeds.dims[1] ?? 0;
    const all = positions ?? [this.countedOn(added)];
    let start = 0;
    let logits: Float32Array = new Float32Array();
    try {
      for (const stop of cuts(added, this.chunk)) {
        const part = stop - start === added ? embeds : this.rows(embeds, start, stop);
        logits = await this.appendPart(
          part,
          all.map(row => row.subarray(start, stop)),
        );
        start = stop;
      }
      return logits;
    } finally {
      embeds.dispose();
    }
  }

  /** Select rows of embeddings [1, S, D]; the memory is shared. */
  private rows(embeds: Tensor, start: number, stop: number): Tensor {
    const width = embeds.dims[2] ?? 0;
    const rows = (embeds.data as Float32Array).subarray(start * width, stop * width);
    return new this.components.runtime.ort.Tensor('float32', rows, [1, stop - start, width]);
  }

  /** Call the decoder once. */
  private async appendPart(
    embeds: Tensor,
    positions: readonly BigInt64Array[],
  ): Promise<Float32Array> {
    const feeds = this.feeds(embeds, positions);
    try {
      const logits: Rows = await rowsOf(await this.run(feeds));
      this.tokens += embeds.dims[1] ?? 0;
      return logits.data.subarray((logits.count - 1) * logits.width);
    } finally {
      const { inputs_embeds: _, ...made } = feeds;
      Object.values(made).forEach(tensor => tensor.dispose());
    }
  }

  private countedOn(added: number): BigInt64Array {
    const start = this.tokens + this.ropeDelta;
    return BigInt64Array.from({ length: added }, (_, i) => BigInt(start + i));
  }

  /** Make all inputs except the cache that the decoder has. */
  private feeds(inputs_embeds: Tensor, positions: readonly BigInt64Array[]): Feeds {
    const { decoder } = this.components;
    const added = inputs_embeds.dims[1] ?? 0;
    const total = this.tokens + added;
    const axes = decoder.positionsRank === 3 ? [0, 1, 2] : [0];
    const rows = axes.map(axis => positions[positions.length === 1 ? 0 : axis]!); // one row serves all
    const position_ids = new BigInt64Array(axes.length * added);
    rows.forEach((row, axis) => position_ids.set(row, axis * added));
    const dims = axes.length === 3 ? [3, 1, added] : [1, added];
    const int64 = (data: BigInt64Array, shape: number[]) =>
      this.components.tensor('int64', data, shape);
    const offered: Feeds = {
      inputs_embeds,
      attention_mask: int64(new BigInt64Array(total).fill(1n), [1, total]),
      position_ids: int64(position_ids, dims),
      num_logits_to_keep: int64(BigInt64Array.of(1n), []),
    };
    return Object.fromEntries(Object.entries(offered).filter(([name]) => decoder.inputs.has(name)));
  }
}

class GrowingCache extends KeyValueCache {
  protected override readonly chunk = CHUNK;
  private readonly past: Feeds = {};

  constructor(components: Components) {
    super(components);
    for (const { past, type, heads, headDim } of components.decoder.ports) {
      const empty = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
      this.past[past] = new components.runtime.ort.Tensor(type, empty, [1, heads, 0, headDim]);
    }
  }

  protected async run(feeds: Feeds): Promise<Tensor | undefined> {
    const wanted = this.tokens + (feeds.inputs_embeds?.dims[1] ?? 0);
    const outputs = await this.components.decode({ ...feeds, ...this.past });
    for (const { past, present } of this.components.decoder.ports) {
      const grown = outputs[present];
      if (grown?.dims[2] !== wanted) {
        const message = `${past} has ${grown?.dims[2]} tokens, expected ${wanted}`;
        throw new VlmportError(
          'BundleError',
          'bundle.wrong-graph',
          message,
          'export the bundle again',
        );
      }
      this.past[past]?.dispose();
      this.past[past] = grown;
    }
    return outputs.logits;
  }

  reserve(): void {} // it grows with each run

  truncate(length: number): void {
    for (const [name, tensor] of Object.entries(this.past)) {
      if ((tensor.dims[2] ?? 0) <= length) continue;
      this.past[name] = firstOfAxis(this.components.runtime.ort, tensor, 2, length);
      tensor.dispose();
    }
    this.tokens = Math.min(length, this.tokens);
  }

  dispose(): void {
    Object.values(this.past).forEach(tensor => tensor.dispose());
  }
}

class BufferCache extends KeyValueCache {
  private buffers: GPUBuffer[] = [];
  private readonly past: Feeds = {};
  private readonly fetches: Record<string, Tensor | null> = { logits: null };

  constructor(
    components: Components,
    private readonly gpu: GPUDevice,
    private capacity: number,
  ) {
    super(components);
    this.bind(components.decoder.ports.map(port => this.create(port)));
  }

  protected async run(feeds: Feeds): Promise<Tensor | undefined> {
    return (await this.components.decode({ ...feeds, ...this.past }, this.fetches)).logits;
  }

  /** Copy the contents to larger buffers [heads, capacity, headDim], head by head. */
  reserve(length: number): void {
    if (length <= this.capacity) return;
    const { ports } = this.components.decoder;
    const { context_length } = this.components.manifest.dims;
    const [old, narrow] = [this.buffers, this.capacity];
    this.capacity = Math.max(length, Math.min(2 * narrow, context_length));
    const grown = ports.map(port => this.create(port));
    const encoder = this.gpu.createCommandEncoder();
    ports.forEach((port, i) => {
      const row = port.headDim * (BYTES[port.type] ?? 4);
      for (let head = 0; this.tokens && head < port.heads; head++) {
        const [from, to] = [head * narrow * row, head * this.capacity * row];
        encoder.copyBufferToBuffer(old[i]!, from, grown[i]!, to, this.tokens * row);
      }
    });
    this.gpu.queue.submit([encoder.finish()]);
    this.dispose();
    this.bind(grown);
  }

  /** The buffers stay: their contents after the length are never read. */
  truncate(length: number): void {
    this.tokens = Math.min(length, this.tokens);
  }

  dispose(): void {
    Object.values(this.past).forEach(tensor => tensor.dispose());
    this.buffers.forEach(buffer => buffer.destroy());
  }

  private create({ heads, headDim, type }: CachePort): GPUBuffer {
    const size = heads * this.capacity * headDim * (BYTES[type] ?? 4);
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    return this.gpu.createBuffer({ size: Math.ceil(size / 16) * 16, usage });
  }

  private bind(buffers: GPUBuffer[]): void {
    this.buffers = buffers;
    this.components.decoder.ports.forEach(({ past, present, type, heads, headDim }, i) => {
      const { Tensor } = this.components.runtime.ort;
      const shared = Tensor.fromGpuBuffer(buffers[i]!, {
        dataType: type === 'float16' ? 'float16' : 'float32',
        dims: [1, heads, this.capacity, headDim],
      });
      this.past[past] = this.fetches[present] = shared;
    });
  }
}
