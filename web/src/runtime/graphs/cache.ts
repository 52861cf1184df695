/**
 * The key-value cache: rows of equal length (the twin of vlmport/runtime/graphs/cache.py).
 *
 * A prompt is run in one row, which the first choice of tokens may copy to several. The rows of one
 * request grow together, so they always have the same length.
 *
 * On the GPU, past and present are one buffer for each row that a step writes in place, and rows
 * are run one after the other. WebAssembly copies the inputs and outputs of each run, so there the
 * cache is never larger than the text, and all rows are run in one call. Where a decoder scales
 * activations by all rows of a call, rows are run one by one, as in Python: a beam that two others
 * continue is then not even copied, because each run makes new tensors.
 */

import { VlmportError } from '../../errors.js';
import type { Components } from './components.js';
import type { CachePort } from './decoder.js';
import { type Rows, rowsOf } from './rows.js';
import type { Feeds, Tensor } from './sessions.js';
import { firstOfAxis, gathered } from './slices.js';

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

  /** Call the decoder for the rows of one group, which become longer. */
  protected abstract run(feeds: Feeds, group: number): Promise<Tensor | undefined>;
  /** The number of rows in each call of a step. */
  protected abstract groups(): readonly number[];
  abstract dispose(): void;

  /** Make room for sequences of `length` tokens; the contents stay. */
  abstract reserve(length: number): void;

  /** Keep one row, and remove all but its first `length` tokens. */
  abstract truncate(length: number): void;

  /**
   * Make `sources.length` rows that continue the rows `sources`. Returns the row of each
   * continuation; all of 0 … sources.length - 1 occur.
   */
  abstract reorder(sources: readonly number[]): readonly number[];

  /** The number of tokens in each row. */
  get length(): number {
    return this.tokens;
  }

  /**
   * Run embeddings [1, S, D] after the tokens in the cache, which has one row, and return the
   * logits of the last `keep` of them. Disposes `embeds`.
   *
   * `positions` has the positions of the new tokens, one row of S or three; without it they count
   * on. A long prompt is run in chunks, unless more logits are asked for than the last chunk surely
   * has.
   */
  async append(
    embeds: Tensor,
    positions?: readonly BigInt64Array[],
    keep = 1,
  ): Promise<Float32Array[]> {
    const added = embeds.dims[1] ?? 0;
    const all = positions ?? [this.countedOn(added)];
    let start = 0;
    let logits: Float32Array[] = [];
    try {
      for (const stop of cuts(added, keep <= this.chunk / 2 ? this.chunk : Infinity)) {
        const part = stop - start === added ? embeds : this.rows(embeds, start, stop);
        const rows = all.map(row => row.subarray(start, stop));
        logits = await this.decode(part, rows, 0, Math.min(keep, stop - start));
        this.tokens += stop - start;
        start = stop;
      }
      return logits;
    } finally {
      embeds.dispose();
    }
  }

  /** Append one token to each row, and return the logits of each. */
  async step(tokens: readonly number[]): Promise<Float32Array[]> {
    const logits: Float32Array[] = [];
    let first = 0;
    for (const [group, count] of this.groups().entries()) {
      const ids = tokens.slice(first, first + count);
      const embeds = await this.components.embed(ids, [count, 1]);
      try {
        logits.push(...(await this.decode(embeds, [this.countedOn(1)], group, 1)));
      } finally {
        embeds.dispose();
      }
      first += count;
    }
    this.tokens++;
    return logits;
  }

  /** Select rows of embeddings [1, S, D]; the memory is shared. */
  private rows(embeds: Tensor, start: number, stop: number): Tensor {
    const width = embeds.dims[2] ?? 0;
    const rows = (embeds.data as Float32Array).subarray(start * width, stop * width);
    return new this.components.runtime.ort.Tensor('float32', rows, [1, stop - start, width]);
  }

  /** Call the decoder once, and return the last `keep` logits of each of its rows. */
  private async decode(
    embeds: Tensor,
    positions: readonly BigInt64Array[],
    group: number,
    keep: number,
  ): Promise<Float32Array[]> {
    const feeds = this.feeds(embeds, positions, keep);
    try {
      const { count, width, data }: Rows = await rowsOf(await this.run(feeds, group));
      const each = count / (embeds.dims[0] ?? 1); // all tokens, where the decoder has no `keep`
      return Array.from({ length: count }, (_, at) => at)
        .filter(at => at % each >= each - keep)
        .map(at => data.subarray(at * width, (at + 1) * width));
    } finally {
      const { inputs_embeds: _, ...made } = feeds;
      Object.values(made).forEach(tensor => tensor.dispose());
    }
  }

  private countedOn(added: number): BigInt64Array {
    const start = this.tokens + this.ropeDelta;
    return BigInt64Array.from({ length: added }, (_, i) => BigInt(start + i));
  }

  /** Make all inputs except the cache that the decoder has, with equal positions in each row. */
  private feeds(inputs_embeds: Tensor, positions: readonly BigInt64Array[], keep: number): Feeds {
    const { decoder } = this.components;
    const [batch = 1, added = 0] = inputs_embeds.dims;
    const total = this.tokens + added;
    const axes = decoder.positionsRank === 3 ? [0, 1, 2] : [0];
    const position_ids = new BigInt64Array(axes.length * batch * added);
    for (let at = 0; at < axes.length * batch; at++) {
      const axis = Math.floor(at / batch);
      position_ids.set(positions[positions.length === 1 ? 0 : axis]!, at * added); // one serves all
    }
    const dims = axes.length === 3 ? [3, batch, added] : [batch, added];
    const int64 = (data: BigInt64Array, shape: number[]) =>
      this.components.tensor('int64', data, shape);
    const offered: Feeds = {
      inputs_embeds,
      attention_mask: int64(new BigInt64Array(batch * total).fill(1n), [batch, total]),
      position_ids: int64(position_ids, dims),
      num_logits_to_keep: int64(BigInt64Array.of(BigInt(keep)), []),
    };
    return Object.fromEntries(Object.entries(offered).filter(([name]) => decoder.inputs.has(name)));
  }
}

class GrowingCache extends KeyValueCache {
  protected override readonly chunk = CHUNK;
  /** The tensors of all rows, or row by row, which may share them. */
  private pasts: Feeds[] = [{}];

  constructor(components: Components) {
    super(components);
    for (const { past, type, heads, headDim } of components.decoder.ports) {
      const empty = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
      this.pasts[0]![past] = new components.runtime.ort.Tensor(type, empty, [1, heads, 0, headDim]);
    }
  }

  protected groups(): number[] {
    return this.pasts.map(past => Object.values(past)[0]?.dims[0] ?? 1);
  }

  protected async run(feeds: Feeds, group: number): Promise<Tensor | undefined> {
    const wanted = this.tokens + (feeds.inputs_embeds?.dims[1] ?? 0);
    const old = this.pasts[group]!;
    const outputs = await this.components.decode({ ...feeds, ...old });
    const grown: Feeds = {};
    for (const { past, present } of this.components.decoder.ports) {
      const tensor = outputs[present];
      if (tensor?.dims[2] !== wanted) {
        const message = `${past} has ${tensor?.dims[2]} tokens, expected ${wanted}`;
        throw new VlmportError(
          'BundleError',
          'bundle.wrong-graph',
          message,
          'export the bundle again',
        );
      }
      grown[past] = tensor;
    }
    this.pasts[group] = grown;
    if (!this.pasts.includes(old)) disposeAll(old);
    return outputs.logits;
  }

  reserve(): void {} // it grows with each run

  truncate(length: number): void {
    const [first = {}] = this.pasts;
    const { ort } = this.components.runtime;
    for (const past of new Set(this.pasts)) if (past !== first) disposeAll(past);
    this.pasts = [first];
    for (const [name, tensor] of Object.entries(first)) {
      if (tensor.dims[0] === 1 && (tensor.dims[2] ?? 0) <= length) continue;
      const row = tensor.dims[0] === 1 ? tensor : gathered(ort, tensor, [0]);
      first[name] = firstOfAxis(ort, row, 2, Math.min(length, row.dims[2] ?? 0));
      tensor.dispose();
    }
    this.tokens = Math.min(length, this.tokens);
  }

  reorder(sources: readonly number[]): number[] {
    const places = [...sources.keys()];
    const before = this.pasts;
    if (this.components.decoder.rowByRow) {
      this.pasts = sources.map(source => before[source]!);
      for (const past of new Set(before)) if (!this.pasts.includes(past)) disposeAll(past);
    } else if (this.groups()[0] !== sources.length || sources.some((one, i) => one !== i)) {
      const { ort } = this.components.runtime;
      const rows = Object.entries(before[0]!).map(([name, tensor]) => {
        return [name, gathered(ort, tensor, sources)] as const;
      });
      this.pasts = [Object.fromEntries(rows)];
      disposeAll(before[0]!);
    }
    return places;
  }

  dispose(): void {
    this.pasts.forEach(disposeAll);
  }
}

const disposeAll = (tensors: Feeds) => Object.values(tensors).forEach(tensor => tensor.dispose());

/** The buffers of one row, and the same memory as the decoder's inputs and outputs. */
interface BufferRow {
  readonly buffers: readonly GPUBuffer[];
  readonly past: Feeds;
  readonly fetches: Record<string, Tensor | null>;
}

class BufferCache extends KeyValueCache {
  private all: BufferRow[]; // those past `used` wait to be used again
  private used = 1;

  constructor(
    components: Components,
    private readonly gpu: GPUDevice,
    private capacity: number,
  ) {
    super(components);
    this.all = [this.create()];
  }

  protected groups(): number[] {
    return Array<number>(this.used).fill(1);
  }

  protected async run(feeds: Feeds, group: number): Promise<Tensor | undefined> {
    const { past, fetches } = this.all[group]!;
    return (await this.components.decode({ ...feeds, ...past }, fetches)).logits;
  }

  /** Copy the contents to larger buffers [heads, capacity, headDim], head by head. */
  reserve(length: number): void {
    if (length <= this.capacity) return;
    const { ports } = this.components.decoder;
    const { context_length } = this.components.manifest.dims;
    const [old, narrow] = [this.all, this.capacity];
    this.capacity = Math.max(length, Math.min(2 * narrow, context_length));
    this.all = old.slice(0, this.used).map(() => this.create());
    const encoder = this.gpu.createCommandEncoder();
    this.all.forEach(({ buffers }, n) =>
      ports.forEach((port, i) => {
        const row = port.headDim * (BYTES[port.type] ?? 4);
        for (let head = 0; this.tokens && head < port.heads; head++) {
          const [from, to] = [head * narrow * row, head * this.capacity * row];
          const used = this.tokens * row;
          encoder.copyBufferToBuffer(old[n]!.buffers[i]!, from, buffers[i]!, to, used);
        }
      }),
    );
    this.gpu.queue.submit([encoder.finish()]);
    old.forEach(release);
  }

  /** The buffers stay: their contents after the length are never read. */
  truncate(length: number): void {
    this.used = 1;
    this.tokens = Math.min(length, this.tokens);
  }

  /** A row that continues in its place is not copied. */
  reorder(sources: readonly number[]): number[] {
    const free = new Set(sources.keys());
    const places = sources.map(source => (free.delete(source) ? source : -1));
    while (this.all.length < sources.length) this.all.push(this.create());
    this.used = sources.length;
    if (!free.size) return places;
    const encoder = this.gpu.createCommandEncoder();
    sources.forEach((source, i) => {
      if (places[i] !== -1) return;
      const [target] = free as Iterable<number> as [number];
      free.delete(target);
      this.all[source]!.buffers.forEach((from, port) => {
        encoder.copyBufferToBuffer(from, 0, this.all[target]!.buffers[port]!, 0, from.size);
      });
      places[i] = target;
    });
    this.gpu.queue.submit([encoder.finish()]);
    return places;
  }

  dispose(): void {
    this.all.forEach(release);
  }

  private create(): BufferRow {
    const { ports } = this.components.decoder;
    const { Tensor } = this.components.runtime.ort;
    const row = { buffers: ports.map(port => this.buffer(port)), past: {}, fetches: {} } as {
      buffers: GPUBuffer[];
      past: Feeds;
      fetches: Record<string, Tensor | null>;
    };
    row.fetches.logits = null;
    ports.forEach(({ past, present, type, heads, headDim }, i) => {
      const shared = Tensor.fromGpuBuffer(row.buffers[i]!, {
        dataType: type === 'float16' ? 'float16' : 'float32',
        dims: [1, heads, this.capacity, headDim],
      });
      row.past[past] = row.fetches[present] = shared;
    });
    return row;
  }

  private buffer({ heads, headDim, type }: CachePort): GPUBuffer {
    const size = heads * this.capacity * headDim * (BYTES[type] ?? 4);
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    return this.gpu.createBuffer({ size: Math.ceil(size / 16) * 16, usage });
  }
}

function release({ past, buffers }: BufferRow): void {
  disposeAll(past);
  buffers.forEach(buffer => buffer.destroy());
}
