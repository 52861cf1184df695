/**
 * A conversation whose turns build on each other, with a cache that is kept from turn to turn (the
 * page's part; the worker's part is runtime/conversation-caches.ts).
 *
 * The conversation so far is one `History`, replaced in one assignment when an answer is complete:
 * an abort or an error leaves the old one. The worker has only the images, by number, and the
 * cache.
 */

import { type Caption, whole } from './caption.js';
import { VlmportError } from './errors.js';
import { type ImageSource, toSentImage } from './image-source.js';
import { type Message, checkImages, checkMessages, filled, stripped } from './messages.js';
import type { Model } from './model.js';
import {
  type AnswerOptions,
  type ImageOptions,
  checkFlag,
  checkNames,
  decodingOptions,
  refuseSeveral,
} from './options.js';
import type { NumberedImage } from './protocol.js';
import type { GenerationOptions } from './runtime/decoding/options.js';

export interface ConversationOptions {
  /** A system message, which comes first. */
  system?: string;
  /** Options of the image processor, such as `{ do_image_splitting: false }`; they override the
   * bundle's. */
  imageOptions?: ImageOptions;
  /**
   * Drop the oldest questions and answers, with their images, when a question does not fit into the
   * context. Without it, that is an error.
   */
  dropOldest?: boolean;
}

export interface QuestionOptions extends AnswerOptions {
  /** Images before the question, after the attached ones. */
  images?: readonly ImageSource[];
}

interface Attached {
  readonly source: ImageSource;
  readonly number: number;
}

/** The conversation so far. */
interface History {
  /** Every content is a list of parts; images in it are as they were given. */
  readonly messages: readonly Message[];
  /** The numbers of the same images. */
  readonly images: readonly number[];
  /** Images for the next question. */
  readonly attached: readonly Attached[];
}

/**
 * Questions and answers, with images anywhere among them.
 *
 *     const chat = vlm.conversation({ system: 'Answer in one word.' });
 *     await chat.ask('What color is the square?', { images: [file] });
 *     for await (const piece of chat.stream('And what is left of it?')) text.append(piece);
 *
 * A question belongs to the conversation once its answer is complete. If it fails or is aborted, or
 * its stream is left early, the conversation stays as it was. The work that was done for it is
 * kept, and used when the question is asked again.
 */
export class Conversation {
  private readonly number: number;
  private readonly imageOptions: ImageOptions;
  private readonly dropOldest: boolean;
  private readonly start: readonly Message[];
  private history: History;
  private turn: { readonly signal: AbortSignal | undefined } | null = null; // the open one
  private lastImage = 0; // the highest number so far
  private epoch = 0; // an image of an earlier one is not attached

  /** @internal Call `vlm.conversation(…)`. */
  constructor(
    private readonly model: Model,
    options: ConversationOptions = {},
  ) {
    checkNames(options, ['system', 'imageOptions', 'dropOldest']);
    const { system, imageOptions, dropOldest = false } = options;
    checkFlag('dropOldest', dropOldest);
    this.dropOldest = dropOldest;
    this.number = model.newConversation();
    this.imageOptions = { ...imageOptions };
    this.start = system === undefined ? [] : filled([{ role: 'system', content: system }]);
    this.history = { messages: this.start, images: [], attached: [] };
  }

  /** All messages so far, in the form that `vlm.generate` takes, with images as given. */
  get messages(): Message[] {
    return copied(this.history.messages);
  }

  /** The number of images that wait for the next question. */
  get attached(): number {
    return this.history.attached.length;
  }

  /** Add an image to the next question. Throws ImageError or OptionError at once. */
  async attach(source: ImageSource): Promise<void> {
    const [number, { epoch }] = [++this.lastImage, this];
    const image = { number, image: await toSentImage(source) };
    await this.model.attach(this.number, image, this.imageOptions);
    if (epoch !== this.epoch) {
      this.forget([number]);
      return;
    }
    this.history = { ...this.history, attached: [...this.history.attached, { source, number }] };
  }

  /** Remove the images that wait for the next question. */
  detach(): void {
    this.epoch++;
    this.forget(this.history.attached.map(one => one.number));
    this.history = { ...this.history, attached: [] };
  }

  /** Remove everything except the system message: attached images and the cache too. */
  reset(): void {
    this.epoch++;
    this.forget(null);
    this.history = { messages: [...this.start], images: [], attached: [] };
  }

  /**
   * Ask about these images and everything before. Without a question the model is asked for a
   * caption, as by `vlm.caption`.
   *
   * Throws VlmportError (for a conversation longer than the context, for example: before anything
   * is encoded), or the signal's reason.
   */
  async ask(question?: string, options: QuestionOptions = {}): Promise<Caption> {
    return whole(this.answer(question, options));
  }

  /**
   * Stream the answer of `ask` piece by piece; the generator returns the whole answer.
   *
   * The answer belongs to the conversation when its last piece is given. Ask one question at a
   * time. Options that ask for several sequences throw: which is best is known only at the end.
   */
  stream(question?: string, options: QuestionOptions = {}): AsyncGenerator<string, Caption> {
    return this.answer(question, options, refuseSeveral);
  }

  /** Stream an answer; one of several sequences has no pieces. */
  private answer(
    question: string | undefined,
    options: QuestionOptions,
    check: (options: GenerationOptions) => void = () => {},
  ): AsyncGenerator<string, Caption> {
    const decoding = decodingOptions(this.model.info, options, ['images']);
    check(decoding);
    const { images = [], signal } = options;
    checkImages(images);
    if (question !== undefined && typeof question !== 'string') {
      const message = `a question must be a text, got ${typeof question}`;
      const hint = "for example ask('…', { images: […] })";
      throw new VlmportError('PromptError', 'prompt.wrong-value', message, hint);
    }
    return this.pieces(question, images, decoding, signal);
  }

  private async *pieces(
    question: string | undefined,
    images: readonly ImageSource[],
    decoding: GenerationOptions,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<string, Caption> {
    signal?.throwIfAborted();
    const turn = this.begin(signal);
    const before = this.history;
    const fresh: number[] = [];
    let ended = false;
    try {
      const message = this.message(question, [
        ...before.attached.map(one => one.source),
        ...images,
      ]);
      const { images: sources } = checkMessages([...before.messages, message]);
      const known = [...before.images, ...before.attached.map(one => one.number)];
      const all: NumberedImage[] = known.map(number => ({ number, image: null }));
      for (const source of sources.slice(known.length)) {
        fresh.push(++this.lastImage);
        all.push({ number: this.lastImage, image: await toSentImage(source) });
      }
      const { imageOptions, number: conversation } = this;
      const options = {
        imageOptions,
        conversation,
        options: decoding,
      };
      let kept = before.messages;
      let numbered = all;
      for (;;) {
        const rest = kept.slice(this.start.length); // questions and answers, alternating
        const leavesRoom = this.dropOldest && rest.length > 0;
        const { messages } = checkMessages([...kept, message]);
        const alone = rest.length ? checkMessages([...this.start, message]).messages : null;
        try {
          const prompt = { messages, alone, images: numbered, leavesRoom, ...options };
          return yield* this.model.stream(prompt, signal, text => {
            this.end(before, [...kept, message], numbered, text);
            this.forget(known.filter(number => !numbered.some(one => one.number === number)));
            ended = true;
          });
        } catch (error) {
          const isFull = error instanceof VlmportError && error.code === 'conversation.full';
          if (!isFull || !this.dropOldest) throw error;
        }
        kept = [...this.start, ...rest.slice(2)];
        // The worker has read all images by now.
        numbered = numbered.slice(countImages(rest.slice(0, 2)));
        numbered = numbered.map(({ number }) => ({ number, image: null }));
      }
    } finally {
      if (!ended) this.forget(fresh);
      if (this.turn === turn) this.turn = null;
    }
  }

  private begin(signal: AbortSignal | undefined) {
    if (this.turn && !this.turn.signal?.aborted) {
      const message = 'this conversation is still answering a question';
      const hint = 'await the answer, leave its loop or abort it before the next question';
      throw new VlmportError('PromptError', 'conversation.busy', message, hint);
    }
    return (this.turn = { signal });
  }

  /** Make a user's message; without a question, the bundle's message for a caption. */
  private message(question: string | undefined, images: readonly ImageSource[]): Message {
    const { caption } = this.model.info;
    const parts = images.map(() => ({ type: 'image' as const }));
    const text = { type: 'text' as const, text: question ?? '' };
    const messages: readonly Message[] =
      question === undefined
        ? (caption as readonly Message[])
        : [{ role: 'user', content: [...parts, text] }];
    if (messages.length !== 1) {
      const message = `this bundle asks for a caption with ${messages.length} messages, and a turn has one`;
      throw new VlmportError('PromptError', 'prompt.no-question', message, 'give a question');
    }
    return filled(messages, images)[0]!;
  }

  /** Add the question and its answer to the conversation. Throws PromptError after a reset. */
  private end(
    before: History,
    messages: readonly Message[],
    images: readonly NumberedImage[],
    answer: string,
  ): void {
    if (this.history.messages !== before.messages) {
      const message = 'the conversation was reset while this answer was generated';
      const hint = 'abort the answer before a reset';
      throw new VlmportError('PromptError', 'conversation.went-on', message, hint);
    }
    const content = [{ type: 'text' as const, text: stripped(answer) }];
    this.history = {
      messages: [...messages, { role: 'assistant', content }],
      images: images.map(one => one.number),
      attached: this.history.attached.filter(one => !before.attached.includes(one)),
    };
  }

  /** Have the worker remove images, or with null the cache too. */
  private forget(numbers: readonly number[] | null): void {
    if (numbers?.length === 0) return;
    this.model.link.post({ type: 'forget', conversation: this.number, numbers });
  }
}

const countImages = (messages: readonly Message[]): number => checkMessages(messages).images.length;

const copied = (messages: readonly Message[]): Message[] =>
  messages.map(({ content, ...rest }) => ({
    ...rest,
    content: typeof content === 'string' ? content : content.map(part => ({ ...part })),
  }));
