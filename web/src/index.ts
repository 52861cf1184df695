export { cachedModels, clearCache } from './bundle/store.js';
export type { CachedModel } from './bundle/store.js';
export { VlmportError } from './errors.js';
export type { ErrorCode } from './errors.js';
export type { PictureSource, PixelValues, RawImage } from './picture.js';
export { PrefixConditioningVLM } from './prefix.js';
export type { Device, Progress } from './protocol.js';
export { Caption, VLM } from './vlm.js';
export type { CaptionOptions, VlmOptions } from './vlm.js';
