/**
 * Check that token ids have an embedding (the twin of vlmport/runtime/graphs/base.py and
 * vlmport/files/onnx_bytes.py).
 *
 * For an id past the table, some kernels give zeros and some another row. So the number of rows is
 * read from the graph's bytes, and ids are checked before each look-up.
 */

import { VlmportError } from '../../errors.js';

// Kinds of a protobuf field.
const [VARINT, FIXED64, BYTES, FIXED32] = [0, 1, 2, 5];
// Numbers of fields in onnx.proto.
const GRAPH = 7; // of a model
const [NODE, INITIALIZER] = [1, 5]; // of a graph
const [INPUT, OP_TYPE, ATTRIBUTE] = [1, 4, 5]; // of a node
const [NAME, WHOLE] = [1, 3]; // of an attribute: `name`, `i`
const [DIMS, TENSOR_NAME] = [1, 8]; // of a tensor
const LOOK_UPS: ReadonlyMap<string, string> = new Map([
  ['Gather', 'axis'],
  ['GatherBlockQuantized', 'gather_axis'],
]);

interface Field {
  readonly number: number;
  readonly kind: number;
  /** The value of a whole number; else 0. */
  readonly value: number;
  readonly start: number;
  readonly end: number;
}

/**
 * Return the number of rows of the table in which a graph looks up its input `ids`, the smallest of
 * several.
 *
 * It is null where there is no table, as in a graph that changes the ids first. Throws BundleError.
 */
export function tableRows(model: Uint8Array, ids: string): number | null {
  const axes = new Map<string, number>();
  const dims = new Map<string, number[]>();
  for (const graph of fields(model, 0, model.length)) {
    if (graph.number !== GRAPH) continue;
    for (const field of fields(model, graph.start, graph.end)) {
      if (field.number === NODE) {
        const found = lookUp(model, field, ids);
        if (found) axes.set(...found);
      } else if (field.number === INITIALIZER) {
        dims.set(...tensor(model, field));
      }
    }
  }
  const rows = [...axes].flatMap(([name, axis]) => dims.get(name)?.[axis] ?? []);
  return rows.length ? Math.min(...rows) : null;
}

/**
 * Throws PromptError for an id that is negative or past the embedding's rows.
 *
 * `textOf` returns a token's text, where the tokenizer knows it.
 */
export function checkIds(
  ids: readonly number[],
  rows: number,
  textOf: (id: number) => string | undefined,
): void {
  const wrong = ids.filter(id => !(id >= 0 && id < rows));
  const [first] = wrong;
  if (first === undefined) return;
  const text = first >= 0 ? textOf(first)?.slice(0, 80) : undefined;
  const named = text === undefined ? `token ${first}` : `token ${first} ('${text}')`;
  const message = `${named} has no embedding: the table has ${rows} rows; ${wrong.length} of ${ids.length} tokens have none`;
  const hint = 'leave this token out; the tokenizer knows more tokens than the model';
  throw new VlmportError('PromptError', 'prompt.token-past-embedding', message, hint);
}

/** Return the table of a node that looks up `ids`, and the axis. */
function lookUp(data: Uint8Array, node: Field, ids: string): [string, number] | null {
  const inputs: string[] = [];
  const attributes = new Map<string, number>();
  let operator = '';
  for (const field of fields(data, node.start, node.end)) {
    if (field.number === INPUT) inputs.push(textIn(data, field));
    else if (field.number === OP_TYPE) operator = textIn(data, field);
    else if (field.number === ATTRIBUTE) {
      const parts = new Map(
        [...fields(data, field.start, field.end)].map(one => [one.number, one]),
      );
      const [name, value] = [parts.get(NAME!), parts.get(WHOLE!)];
      if (name && value) attributes.set(textIn(data, name), value.value);
    }
  }
  const axis = LOOK_UPS.get(operator);
  const [table, indices] = inputs;
  if (axis === undefined || table === undefined || indices !== ids) return null;
  return [table, attributes.get(axis) ?? 0];
}

/** Read a tensor's name and dims, which are packed into one field or have one each. */
function tensor(data: Uint8Array, { start, end }: Field): [string, number[]] {
  const sizes: number[] = [];
  let name = '';
  for (const field of fields(data, start, end)) {
    if (field.number === TENSOR_NAME) name = textIn(data, field);
    else if (field.number === DIMS && field.kind === BYTES) {
      for (let at = field.start; at < field.end;) {
        const [size, next] = varint(data, at, field.end);
        sizes.push(size);
        at = next;
      }
    } else if (field.number === DIMS) sizes.push(field.value);
  }
  return [name, sizes];
}

function* fields(data: Uint8Array, from: number, end: number): Generator<Field, void, undefined> {
  for (let at = from; at < end;) {
    const [tag, after] = varint(data, at, end);
    const kind = tag % 8;
    let [value, start] = [0, after];
    at = after;
    if (kind === VARINT) [value, at] = varint(data, at, end);
    else if (kind === FIXED64 || kind === FIXED32) at += kind === FIXED64 ? 8 : 4;
    else if (kind === BYTES) {
      const [length, body] = varint(data, at, end);
      [start, at] = [body, body + length];
    } else throw notOnnx();
    if (at > end) throw notOnnx();
    yield { number: Math.floor(tag / 8), kind, value, start, end: at };
  }
}

/** Read a number in groups of seven bits, lowest first; return it and where it ends. */
function varint(data: Uint8Array, from: number, end: number): [number, number] {
  let value = 0;
  for (let at = from, scale = 1; at < end && at < from + 10; at++, scale *= 128) {
    value += (data[at]! & 0x7f) * scale;
    if (data[at]! < 0x80) return [value, at + 1];
  }
  throw notOnnx();
}

const textIn = (data: Uint8Array, { start, end }: Field) =>
  new TextDecoder().decode(data.subarray(start, end));

const notOnnx = () =>
  new VlmportError(
    'BundleError',
    'bundle.unreadable',
    'embed_tokens: the file is not a complete ONNX graph',
    'export the bundle again',
  );
