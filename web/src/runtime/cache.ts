/**
 * The key-value cache of one sequence (the twin of vlmport/runtime/cache.py).
 *
 * On the GPU, past and present are one buffer that a step writes in place. WebAssembly copies what
 * goes in and comes out of each run, so there the cache grows with the text and is never larger.
 */

import { VlmportError } from '../errors.js';
import type { Components, Feeds } from './components.js';
import { type Rows, rowsOf } from './rows.js';
import type { Tensor } from './sessions.js';

const BYTES: Readonly<Record<string, number>> = { float32: 4, float16: 2 };

/** The cache that fits the device. `capacity` is the longest that the sequence may become. */
export function openCache(components: Components, capacity: number): KeyValueCache {
  return components.runtime.gpu === null
    ? new GrowingCache(components)
    : new BufferCache(components, components.runtime.gpu, capacity);
}

export abstract class KeyValueCache {
  /** How many tokens are in it. */
  length = 0;

  constructor(protected readonly components: Components) {}

  protected abstract run(feeds: Feeds): Promise<Tensor | undefined>;
  abstract dispose(): void;

  /** Run embeddings [1, S, D] after what is here; the logits of the last. Disposes `embeds`. */
  async append(embeds: Tensor): Promise<Float32Array> {
    const added = embeds.dims[1] ?? 0;
    const feeds = this.feeds(embeds, added);
    try {
      const logits: Rows = await rowsOf(await this.run(feeds));
      this.length += added;
      return logits.data.subarray((logits.count - 1) * logits.width);
    } finally {
      Object.values(feeds).forEach(tensor => tensor.dispose());
    }
  }

  /** All inputs but the cache, as far as the decoder has them. */
  private feeds(inputs_embeds: Tensor, added: number): Feeds {
    const { decoder } = this.components;
    const total = this.length + added;
    const positions = Array.from({ length: added }, (_, i) => BigInt(this.length + i));
    const axes = decoder.positionsRank === 3 ? 3 : 1; // time, height and width alike
    const position_ids = BigInt64Array.from(Array<bigint[]>(axes).fill(positions).flat());
    const dims = axes === 3 ? [3, 1, added] : [1, added];
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
  private readonly past: Feeds = {};

  constructor(components: Components) {
    super(components);
    for (const { past, type, heads, headDim } of components.decoder.ports) {
      const empty = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
      this.past[past] = new components.runtime.ort.Tensor(type, empty, [1, heads, 0, headDim]);
    }
  }

  protected async run(feeds: Feeds): Promise<Tensor | undefined> {
    const wanted = this.length + (feeds.inputs_embeds?.dims[1] ?? 0);
    const outputs = await this.components.decode({ ...feeds, ...this.past });
    for (const { past, present } of this.components.decoder.ports) {
      const grown = outputs[present];
      if (grown?.dims[2] !== wanted) {
        const message = `${past} grew to ${grown?.dims[2]} after ${wanted} tokens`;
        throw new VlmportError('BundleError', message, 'export the bundle again');
      }
      this.past[past]?.dispose();
      this.past[past] = grown;
    }
    return outputs.logits;
  }

  dispose(): void {
    Object.values(this.past).forEach(tensor => tensor.dispose());
  }
}

class BufferCache extends KeyValueCache {
  private readonly buffers: GPUBuffer[] = [];
  private readonly past: Feeds = {};
  private readonly fetches: Record<string, Tensor | null> = { logits: null };

  constructor(components: Components, gpu: GPUDevice, capacity: number) {
    super(components);
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    for (const { past, present, type, heads, headDim } of components.decoder.ports) {
      const size = heads * capacity * headDim * (BYTES[type] ?? 4);
      const buffer = gpu.createBuffer({ size: Math.ceil(size / 16) * 16, usage });
      this.buffers.push(buffer);
      const shared = components.runtime.ort.Tensor.fromGpuBuffer(buffer, {
        dataType: type === 'float16' ? 'float16' : 'float32',
        dims: [1, heads, capacity, headDim],
      });
      this.past[past] = this.fetches[present] = shared;
    }
  }

  protected async run(feeds: Feeds): Promise<Tensor | undefined> {
    return (await this.components.decode({ ...feeds, ...this.past }, this.fetches)).logits;
  }

  dispose(): void {
    Object.values(this.past).forEach(tensor => tensor.dispose());
    this.buffers.forEach(buffer => buffer.destroy());
  }
}
