/**
 * A conversation: turns that build on each other, and a cache that is carried on (the page's half;
 * the worker's is runtime/conversations.ts).
 *
 * What a conversation is stands in one `State`, replaced whole when an answer is complete: an abort
 * or an error leaves the old one. The worker holds nothing but pictures by number, and the cache.
 */

import { type Caption, whole } from './caption.js';
import { VlmportError } from './errors.js';
import { type Message, checkImages, checkMessages, filled, stripped } from './messages.js';
import type { Model } from './model.js';
import {
  type AnswerOptions,
  type ImageOptions,
  checkAnswerOptions,
  checkFlag,
  checkNames,
} from './options.js';
import { type PictureSource, toPicture } from './picture.js';
import type { NumberedPicture } from './protocol.js';

export interface ConversationOptions {
  /** A system message before all else. */
  system?: string;
  /** Of the image processor, over the bundle's own: `{ do_image_splitting: false }`. */
  imageOptions?: ImageOptions;
  /** Forget the oldest questions and answers, their pictures included, where a question would not
   * fit into the context; else that is an error. */
  dropOldest?: boolean;
}

export interface QuestionOptions extends AnswerOptions {
  /** They stand before the question, after those that were attached. */
  images?: readonly PictureSource[];
}

interface Attached {
  readonly source: PictureSource;
  readonly number: number;
}

/** What has been said: every content a list of parts, pictures within as they were given. */
interface State {
  readonly messages: readonly Message[];
  readonly pictures: readonly number[];
  readonly attached: readonly Attached[];
}

/**
 * Questions and answers, with pictures anywhere among them.
 *
 *     const chat = vlm.conversation({ system: 'Answer in one word.' });
 *     await chat.ask('What color is the square?', { images: [file] });
 *     for await (const piece of chat.stream('And what is left of it?')) text.append(piece);
 *
 * A question belongs to the conversation once its answer is complete. One that fails, is aborted, or
 * whose stream is left early, leaves the conversation as it was; what was encoded and prefilled for
 * it is not lost, and serves when it is asked again.
 */
export class Conversation {
  private readonly number: number;
  private readonly imageOptions: ImageOptions;
  private readonly dropOldest: boolean;
  private readonly start: readonly Message[];
  private state: State;
  private turn: { readonly signal: AbortSignal | undefined } | null = null; // under way
  private pictures = 0; // numbers given so far
  private epoch = 0; // a picture of an earlier one waits for no question

  /** @internal `vlm.conversation(…)` makes one. */
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
    const said = system === undefined ? [] : filled([{ role: 'system', content: system }]);
    this.state = { messages: said, pictures: [], attached: [] };
    this.start = said;
  }

  /** All that was said, in the form that `vlm.generate` takes; pictures stand in it as given. */
  get messages(): Message[] {
    return copied(this.state.messages);
  }

  /** How many pictures wait for the next question. */
  get attached(): number {
    return this.state.attached.length;
  }

  /** Give a picture along with the next question. Throws ImageError or OptionError at once. */
  async attach(source: PictureSource): Promise<void> {
    const [number, { epoch }] = [++this.pictures, this];
    const picture = { number, picture: await toPicture(source) };
    await this.model.attach(this.number, picture, this.imageOptions);
    if (epoch !== this.epoch) {
      this.forget([number]);
      return;
    }
    this.state = { ...this.state, attached: [...this.state.attached, { source, number }] };
  }

  /** Put away the pictures that wait for the next question. */
  detach(): void {
    this.epoch++;
    this.forget(this.state.attached.map(one => one.number));
    this.state = { ...this.state, attached: [] };
  }

  /** Forget all but the system message: attached pictures and the cache too. */
  reset(): void {
    this.epoch++;
    this.forget(null);
    this.state = { messages: [...this.start], pictures: [], attached: [] };
  }

  /**
   * Ask about these pictures and all that came before. Without a question the model is asked for a
   * caption, as `vlm.caption` asks.
   *
   * Throws VlmportError (a conversation longer than the context among them, before anything is
   * encoded), or the signal's reason.
   */
  async ask(question?: string, options: QuestionOptions = {}): Promise<Caption> {
    return whole(this.stream(question, options));
  }

  /**
   * The answer of `ask`, piece by piece as it is made; the generator returns the whole.
   *
   * The answer belongs to the conversation when its last piece is given. One question at a time.
   */
  stream(question?: string, options: QuestionOptions = {}): AsyncGenerator<string, Caption> {
    checkAnswerOptions(options, ['images']);
    const { images = [], ...others } = options;
    checkImages(images);
    if (question !== undefined && typeof question !== 'string') {
      const message = `a question is a text, got ${typeof question}`;
      throw new VlmportError(
        'PromptError',
        'prompt.wrong-value',
        message,
        "ask('…', { images: […] })",
      );
    }
    return this.pieces(question, images, others);
  }

  private async *pieces(
    question: string | undefined,
    images: readonly PictureSource[],
    { maxNewTokens, skipSpecialTokens = true, signal }: AnswerOptions,
  ): AsyncGenerator<string, Caption> {
    signal?.throwIfAborted();
    const turn = this.begin(signal);
    const before = this.state;
    const fresh: number[] = [];
    let ended = false;
    try {
      const message = this.message(question, [
        ...before.attached.map(one => one.source),
        ...images,
      ]);
      const { pictures: sources } = checkMessages([...before.messages, message]);
      const known = [...before.pictures, ...before.attached.map(one => one.number)];
      const all: NumberedPicture[] = known.map(number => ({ number, picture: null }));
      for (const source of sources.slice(known.length)) {
        fresh.push(++this.pictures);
        all.push({ number: this.pictures, picture: await toPicture(source) });
      }
      const { imageOptions, number: conversation } = this;
      const most = maxNewTokens ?? null;
      const how = { imageOptions, conversation, maxNewTokens: most, skipSpecialTokens };
      let kept = before.messages;
      let pictures = all;
      for (;;) {
        const rest = kept.slice(this.start.length); // questions and answers, one after the other
        const leavesRoom = this.dropOldest && rest.length > 0;
        const { messages } = checkMessages([...kept, message]);
        const alone = rest.length ? checkMessages([...this.start, message]).messages : null;
        try {
          const asked = { messages, alone, pictures, leavesRoom, ...how };
          return yield* this.model.stream(asked, signal, said => {
            this.end(before, [...kept, message], pictures, said);
            this.forget(known.filter(number => !pictures.some(one => one.number === number)));
            ended = true;
          });
        } catch (error) {
          const isFull = error instanceof VlmportError && error.code === 'conversation.full';
          if (!isFull || !this.dropOldest) throw error;
        }
        kept = [...this.start, ...rest.slice(2)];
        // The worker has read all of them by now.
        pictures = pictures.slice(countImages(rest.slice(0, 2)));
        pictures = pictures.map(({ number }) => ({ number, picture: null }));
      }
    } finally {
      if (!ended) this.forget(fresh);
      if (this.turn === turn) this.turn = null;
    }
  }

  private begin(signal: AbortSignal | undefined) {
    if (this.turn && !this.turn.signal?.aborted) {
      const message = 'this conversation is still answering';
      const hint = 'await the answer, leave its loop or abort it before the next question';
      throw new VlmportError('PromptError', 'conversation.busy', message, hint);
    }
    return (this.turn = { signal });
  }

  /** A user's message; with no question, the bundle's own for a caption. */
  private message(question: string | undefined, images: readonly PictureSource[]): Message {
    const { caption } = this.model.info;
    const parts = images.map(() => ({ type: 'image' as const }));
    const text = { type: 'text' as const, text: question ?? '' };
    const asked: readonly Message[] =
      question === undefined
        ? (caption as readonly Message[])
        : [{ role: 'user', content: [...parts, text] }];
    if (asked.length !== 1) {
      const message = `a caption is asked for by ${asked.length} messages, a question is one`;
      throw new VlmportError('PromptError', 'prompt.no-question', message, 'give a question');
    }
    return filled(asked, images)[0]!;
  }

  /** The question and its answer are part of the conversation from here on. */
  private end(
    before: State,
    messages: readonly Message[],
    pictures: readonly NumberedPicture[],
    said: string,
  ): void {
    if (this.state.messages !== before.messages) {
      const message = 'the conversation was reset while this answer was made';
      throw new VlmportError(
        'PromptError',
        'conversation.went-on',
        message,
        'abort the answer before a reset',
      );
    }
    const text = stripped(said);
    const answer: Message = { role: 'assistant', content: [{ type: 'text', text }] };
    this.state = {
      messages: [...messages, answer],
      pictures: pictures.map(one => one.number),
      attached: this.state.attached.filter(one => !before.attached.includes(one)),
    };
  }

  /** Have the worker forget pictures, or with null the cache too. */
  private forget(numbers: readonly number[] | null): void {
    if (numbers?.length === 0) return;
    this.model.link.post({ type: 'forget', conversation: this.number, numbers });
  }
}

const countImages = (messages: readonly Message[]): number =>
  checkMessages(messages).pictures.length;

const copied = (messages: readonly Message[]): Message[] =>
  messages.map(({ content, ...rest }) => ({
    ...rest,
    content: typeof content === 'string' ? content : content.map(part => ({ ...part })),
  }));
