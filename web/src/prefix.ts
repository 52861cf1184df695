/**
 * The API that distilvit2 documents for its captioner, on top of `VLM`.
 */

import { VlmportError } from './errors.js';
import { type DecodingOptions, checkCount, checkNames } from './options.js';
import type { ImageSource } from './image-source.js';
import { VLM } from './vlm.js';

const HUB_ID = /^[\w-][\w.-]*\/[\w-][\w.-]*$/;

export interface LoadModelOptions {
  onProgress?: (message: string, percent: number) => void;
}

/** Options of `generate`: as of `VLM.caption`, with `maxLength` for `maxNewTokens`. */
export interface PrefixGenerateOptions extends Pick<DecodingOptions, (typeof DECODING)[number]> {
  /** Maximum number of new tokens (default 30). */
  maxLength?: number;
}

const DECODING = ['numBeams', 'temperature', 'doSample', 'topK', 'topP', 'seed'] as const;

export class PrefixConditioningVLM {
  private vlm: VLM | null = null;
  private loading = new AbortController();

  /** Load a model by its Hub id ('owner/name'), or by a bundle's address ('./models/x/'). */
  async loadModel(modelId: string, options: LoadModelOptions = {}): Promise<void> {
    checkNames(options, ['onProgress']);
    const { onProgress } = options;
    this.loading.abort(); // only the last load counts
    const { signal } = (this.loading = new AbortController());
    const url = HUB_ID.test(modelId) ? `https://huggingface.co/${modelId}/resolve/main/` : modelId;
    const next = await VLM.load(url, {
      signal,
      onProgress: ({ phase, name, loadedBytes, totalBytes }) => {
        const percent = totalBytes ? (100 * loadedBytes) / totalBytes : 0;
        onProgress?.(`${phase} ${name}`, percent);
      },
    });
    this.vlm?.dispose();
    this.vlm = next;
  }

  async caption(image: ImageSource): Promise<string> {
    return (await this.loaded().caption(image)).text;
  }

  /** Caption pixel values [1, 3, height, width], or an image. */
  async generate(pixelValues: ImageSource, options: PrefixGenerateOptions = {}): Promise<string> {
    checkNames(options, ['maxLength', ...DECODING]);
    const { maxLength = 30, numBeams = 1, doSample = false, ...others } = options;
    checkCount('maxLength', maxLength);
    const all = { maxNewTokens: maxLength, numBeams, doSample, ...others };
    return (await this.loaded().caption(pixelValues, all)).text;
  }

  /** Free all memory. A load that still runs ends with an AbortError. */
  dispose(): void {
    this.loading.abort();
    this.vlm?.dispose();
    this.vlm = null;
  }

  private loaded(): VLM {
    if (this.vlm !== null) return this.vlm;
    throw new VlmportError(
      'OptionError',
      'model.not-loaded',
      'no model is loaded',
      'await loadModel(modelId) first',
    );
  }
}
