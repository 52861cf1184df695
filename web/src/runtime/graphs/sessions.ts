/**
 * ONNX Runtime and its sessions, on WebAssembly or WebGPU (the twin of
 * vlmport/runtime/graphs/sessions.py).
 *
 * Traps:
 * - Only the entries `/wasm` and `/webgpu` are used: the WebGPU kernels of the default entry are
 *   silently wrong in several places.
 * - WebGPU attention is wrong from 32 rows on where the subgroup size is 4 and the device has the
 *   feature 'subgroups'. So the device is created here without that feature, and given to each
 *   session as an option: `ort.env.webgpu.device` alone is ignored.
 * - The number of threads has an effect only before the first session.
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
const MAX_THREADS = 4;
// Errors of ONNX Runtime whose .wasm file is missing, or is another file.
const NOT_LOADED = /CompileError|fetching of the wasm|Failed to fetch|NetworkError/;
// Errors for an operator without a kernel for a type. The build with WebGPU lacks a few kernels
// that the other one has: embeddings of 4 bits with a 16-bit output, for example.
const NO_KERNEL = /Failed to find kernel for (?:[\w.]+\.)?(\w+)\(/;

// Limits that ONNX Runtime's kernels may need, beyond WebGPU's defaults.
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

/** Options of a runtime. */
export interface RuntimeOptions {
  readonly threads: number | null; // null: as many as this page may use
  readonly wasmPaths: string | null; // the folder of ONNX Runtime's files; null: its default
}

/** ONNX Runtime on a device. It owns the GPU device. */
export class Runtime {
  private constructor(
    readonly ort: Ort,
    readonly device: Device,
    readonly gpu: GPUDevice | null,
    readonly threads: number,
  ) {}

  /** Import ONNX Runtime for a device. Throws DeviceError where the device is missing. */
  static async start(device: Device, options: RuntimeOptions): Promise<Runtime> {
    const gpu = device === 'webgpu' ? await requestGpu() : null;
    const ort = await importOrt(device);
    const threads = allowedThreads(options.threads);
    ort.env.logLevel = 'fatal'; // errors come as exceptions
    ort.env.wasm.numThreads = threads;
    if (options.wasmPaths !== null) ort.env.wasm.wasmPaths = options.wasmPaths;
    return new Runtime(ort, device, gpu, threads);
  }

  /** Return the same ONNX Runtime without the GPU, so that no file is fetched again. */
  withoutGpu(): Runtime {
    this.dispose();
    return new Runtime(this.ort, 'wasm', null, this.threads);
  }

  /** Whether the device supports 16-bit floats; WebAssembly always does. */
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
      enableMemPattern: false, // there would be a pattern for each length, that is for each token
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

/** Import one of two builds: a page on WebAssembly fetches the smaller one. */
async function importOrt(device: Device): Promise<Ort> {
  try {
    if (device === 'webgpu') return await import('onnxruntime-web/webgpu');
    return await import('onnxruntime-web/wasm');
  } catch (error) {
    throw notLoaded(error);
  }
}

/** The error for a script or a .wasm file of ONNX Runtime that is missing. */
function notLoaded(error: unknown): VlmportError {
  const message = `ONNX Runtime can't be loaded (${firstLine(error)})`;
  const hint =
    'check the connection, and that its .wasm file is where wasmPaths says; then load again';
  return new VlmportError('DownloadError', 'runtime.not-loaded', message, hint);
}

/** Threads need shared memory, which only a cross-origin isolated page has. */
function allowedThreads(wanted: number | null): number {
  if (!globalThis.crossOriginIsolated) return 1;
  return wanted ?? Math.max(1, Math.min(MAX_THREADS, navigator.hardwareConcurrency || 1));
}

async function requestGpu(): Promise<GPUDevice> {
  const gpu = navigator.gpu as GPU | undefined; // not every page has it, unlike TypeScript's types
  if (gpu === undefined) {
    const message = globalThis.isSecureContext
      ? 'this browser has no WebGPU'
      : 'WebGPU needs a page on https or localhost';
    throw new VlmportError('DeviceError', 'device.not-available', message, "use device: 'wasm'");
  }
  try {
    const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' });
    if (adapter === null) throw new Error('no adapter');
    return await requestDevice(adapter);
  } catch (error) {
    const message = `this browser has WebGPU, but no GPU that works (${firstLine(error)})`;
    throw new VlmportError('DeviceError', 'device.not-available', message, "use device: 'wasm'");
  }
}

function requestDevice(adapter: GPUAdapter): Promise<GPUDevice> {
  const wanted: GPUFeatureName[] = ['shader-f16'];
  const info = adapter.info as GPUAdapterInfo | undefined; // missing in older browsers
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
      "use precision: 'auto'",
    );
  }
  const message = `${name} can't be opened on ${device}: ${detail}`;
  const hint = /memory|alloc/i.test(detail)
    ? 'close other pages, or load a smaller precision'
    : 'try another precision or device';
  return new VlmportError('DeviceError', 'graph.not-opened', message, hint);
}
