export { cachedModels, clearCache } from './bundle/store.js';
export type { CachedModel } from './bundle/store.js';
export { Caption } from './caption.js';
export { Conversation } from './conversation.js';
export type { ConversationOptions, QuestionOptions } from './conversation.js';
export type { ErrorCode } from './error-codes.js';
export { VlmportError } from './errors.js';
export type { ErrorKind } from './errors.js';
export type { ImagePart, Message, TextPart } from './messages.js';
export type {
  AnswerOptions,
  CaptionOptions,
  DecodingOptions,
  GenerateOptions,
  ImageOptions,
} from './options.js';
export type {
  ImageSource,
  /** @deprecated The former name of ImageSource. */
  ImageSource as PictureSource,
  PixelValues,
  RawImage,
} from './image-source.js';
export { PrefixConditioningVLM } from './prefix.js';
export type { AnswerData, Device, Progress } from './protocol.js';
export { VLM } from './vlm.js';
export type { VlmOptions } from './vlm.js';
