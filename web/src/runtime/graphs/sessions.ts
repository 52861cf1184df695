/**
 * ONNX Runtime and its sessions, on WebAssembly or WebGPU (the twin of
 * vlmport/runtime/graphs/sessions.py).
 *
 * Traps:
 * - Only the entries `/wasm` and `/webgpu` are used: the kernels that the default entry has for
 *   WebGPU are silently wrong in several places.
 * - WebGPU attention is wrong from 32 rows on where the subgroup size is 4 and the device has the
 *   feature 'subgroups'. So the device is our own, without that feature there, and is handed over
 *   as an option of each session: `ort.env.webgpu.device` alone is ignored.
 * - The number of threads counts only before the first session.
 */

import type * as OrtModule from 'onnxruntime-web/webgpu';
import { VlmportError, firstLine } from '../../errors.js';
import type { Device } from '../../protocol.js';

export type Ort = typeof OrtModule;
export type Session = OrtModule.InferenceSession;
export type Tensor = OrtModule.Tensor;
export type TensorType = OrtModule.Tensor.Type;
export type TensorData = OrtModule.Tensor.DataType;
/** Tensors by name. */
export type Feeds = Record<string, Tensor>;

const SMALLEST_SUBGROUP = 4;
const MOST_THREADS = 4;
// How ONNX Runtime says that its .wasm file did not come, or that something else came instead.
const NOT_LOADED = /CompileError|fetching of the wasm|Failed to fetch|NetworkError/;
// How it says that it lacks an operator for some type. The build with WebGPU lacks a few that the
// other one has: embeddings of 4 bits that come out in 16, for example.
const NO_KERNEL = /Failed to find kernel for (?:[\w.]+\.)?(\w+)\(/;

// What ONNX Runtime's kernels may ask of a device, beyond WebGPU's defaults.
const LIMITS = [
  'maxBufferSize',
  'maxStorageBufferBindingSize',
  'maxStorageBuffersPerShaderStage',
  'maxComputeWorkgroupStorageSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxComputeWorkgroupSizeY',
  'maxComputeWorkgroupSizeZ',
] as const;

/** What a runtime is started with. */
export interface RuntimeOptions {
  readonly threads: number | null; // null: what this page may have
  readonly wasmPaths: string | null; // where ONNX Runtime's files lie; null: where it looks itself
}

/** ONNX Runtime on a device. It owns the GPU device. */
export class Runtime {
  private constructor(
    readonly ort: Ort,
    readonly device: Device,
    readonly gpu: GPUDevice | null,
    readonly threads: number,
  ) {}

  /** Throws DeviceError where the device is not there. */
  static async start(device: Device, options: RuntimeOptions): Promise<Runtime> {
    const gpu = device === 'webgpu' ? await requestGpu() : null;
    const ort = await importOrt(device);
    const threads = allowedThreads(options.threads);
    ort.env.logLevel = 'fatal'; // errors come as exceptions
    ort.env.wasm.numThreads = threads;
    if (options.wasmPaths !== null) ort.env.wasm.wasmPaths = options.wasmPaths;
    return new Runtime(ort, device, gpu, threads);
  }

  /** The same ONNX Runtime without the GPU, so that nothing has to be fetched again. */
  withoutGpu(): Runtime {
    this.dispose();
    return new Runtime(this.ort, 'wasm', null, this.threads);
  }

  /** Whether the device computes in 16 bits; WebAssembly always does. */
  get hasFloat16(): boolean {
    return this.gpu === null || this.gpu.features.has('shader-f16');
  }

  /**
   * Open a graph. `onHost` keeps it off the GPU; outputs named in `onGpu` stay there.
   *
   * Throws DeviceError.
   */
  async open(
    name: string,
    model: Uint8Array<ArrayBuffer>,
    data: readonly { readonly path: string; readonly data: Uint8Array<ArrayBuffer> }[],
    { onHost = false, onGpu = [] }: { onHost?: boolean; onGpu?: readonly string[] } = {},
  ): Promise<Session> {
    const host = onHost || this.gpu === null;
    const options: OrtModule.InferenceSession.SessionOptions = {
      executionProviders: [host ? 'wasm' : { name: 'webgpu', device: this.gpu }],
      externalData: [...data],
      enableMemPattern: false, // else one pattern for each length, that is for each token
      logSeverityLevel: 4,
    };
    if (!host && onGpu.length) {
      options.preferredOutputLocation = Object.fromEntries(onGpu.map(one => [one, 'gpu-buffer']));
    }
    try {
      return await this.ort.InferenceSession.create(model, options);
    } catch (error) {
      throw openError(name, host ? 'wasm' : 'webgpu', error);
    }
  }

  dispose(): void {
    this.gpu?.destroy();
  }
}

/** Two imports, so that a page on WebAssembly fetches the smaller build. */
async function importOrt(device: Device): Promise<Ort> {
  try {
    if (device === 'webgpu') return await import('onnxruntime-web/webgpu');
    return await import('onnxruntime-web/wasm');
  } catch (error) {
    throw notLoaded(error);
  }
}

/** The script or the .wasm file of ONNX Runtime did not come. */
function notLoaded(error: unknown): VlmportError {
  const message = `ONNX Runtime can't be loaded (${firstLine(error)})`;
  const hint =
    'check the connection, and that its .wasm file lies where wasmPaths says; load again';
  return new VlmportError('DownloadError', 'runtime.not-loaded', message, hint);
}

/** Threads need memory that is shared, which only a cross-origin isolated page has. */
function allowedThreads(wanted: number | null): number {
  if (!globalThis.crossOriginIsolated) return 1;
  return wanted ?? Math.max(1, Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1));
}

async function requestGpu(): Promise<GPUDevice> {
  const gpu = navigator.gpu as GPU | undefined; // not on every page, whatever TypeScript says
  if (gpu === undefined) {
    const message = globalThis.isSecureContext
      ? 'this browser has no WebGPU'
      : 'WebGPU needs a page on https or localhost';
    throw new VlmportError('DeviceError', 'device.not-available', message, "device: 'wasm' works");
  }
  try {
    const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' });
    if (adapter === null) throw new Error('no adapter');
    return await requestDevice(adapter);
  } catch (error) {
    const message = `this browser offers WebGPU, but no GPU that works (${firstLine(error)})`;
    throw new VlmportError('DeviceError', 'device.not-available', message, "device: 'wasm' works");
  }
}

function requestDevice(adapter: GPUAdapter): Promise<GPUDevice> {
  const wanted: GPUFeatureName[] = ['shader-f16'];
  const info = adapter.info as GPUAdapterInfo | undefined; // older browsers have none
  const smallest = info?.subgroupMinSize ?? SMALLEST_SUBGROUP;
  if (smallest > SMALLEST_SUBGROUP) wanted.push('subgroups');
  return adapter.requestDevice({
    requiredFeatures: wanted.filter(feature => adapter.features.has(feature)),
    requiredLimits: Object.fromEntries(LIMITS.map(name => [name, adapter.limits[name]])),
  });
}

function openError(name: string, device: Device, error: unknown): VlmportError {
  const detail = typeof error === 'number' ? 'out of memory' : firstLine(error);
  if (NOT_LOADED.test(detail)) {
    return notLoaded(error);
  }
  const [, operator] = NO_KERNEL.exec(detail) ?? [];
  if (operator !== undefined) {
    const message = `${name} can't be opened on ${device}: this ONNX Runtime can't compute ${operator} in this precision`;
    return new VlmportError(
      'DeviceError',
      'device.wrong-precision',
      message,
      "precision: 'auto' takes one that it can",
    );
  }
  const message = `${name} can't be opened on ${device}: ${detail}`;
  const hint = /memory|alloc/i.test(detail)
    ? 'close other pages, or load a smaller precision'
    : 'another precision or device may work';
  return new VlmportError('DeviceError', 'graph.not-opened', message, hint);
}
