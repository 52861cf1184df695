/**
 * The API that distilvit2 documents for its captioner, on top of `VLM`.
 *
 * Options that are not supported yet are refused, not ignored.
 */

import { VlmportError } from './errors.js';
import { checkCount, checkNames } from './options.js';
import type { ImageSource } from './image-source.js';
import { VLM } from './vlm.js';

const HUB_ID = /^[\w-][\w.-]*\/[\w-][\w.-]*$/;

export interface LoadModelOptions {
  onProgress?: (message: string, percent: number) => void;
}

export interface PrefixGenerateOptions {
  maxLength?: number;
  numBeams?: number;
  temperature?: number;
  doSample?: boolean;
}

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
    checkNames(options, ['maxLength', 'numBeams', 'temperature', 'doSample']);
    const { maxLength = 30, numBeams = 1, temperature = 1, doSample = false } = options;
    checkCount('maxLength', maxLength);
    if (numBeams !== 1) throw unsupported(`numBeams=${numBeams}`, 'numBeams: 1');
    if (temperature !== 1) throw unsupported(`temperature=${temperature}`, 'temperature: 1');
    if (doSample) throw unsupported('doSample=true', 'doSample: false');
    return (await this.loaded().caption(pixelValues, { maxNewTokens: maxLength })).text;
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

function unsupported(option: string, instead: string): VlmportError {
  return new VlmportError(
    'OptionError',
    'option.unsupported',
    `${option} is not supported yet`,
    `use ${instead}`,
  );
}
