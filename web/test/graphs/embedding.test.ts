import { expect, test } from 'vitest';
import { VlmportError } from '../../src/errors.js';
import { checkIds, tableRows } from '../../src/runtime/graphs/embedding.js';

const bytes = (text: string) => [...new TextEncoder().encode(text)];
const varint = (value: number): number[] =>
  value < 128 ? [value] : [(value % 128) + 128, ...varint(Math.floor(value / 128))];
/** A protobuf field: a whole number, or bytes. */
const field = (number: number, value: number | number[]) =>
  typeof value === 'number'
    ? [...varint(number * 8), ...varint(value)]
    : [...varint(number * 8 + 2), ...varint(value.length), ...value];

interface Shape {
  operator?: string;
  indices?: string;
  axis?: [string, number];
  packed?: boolean;
}

/** An ONNX file with one node, and a table of 300 x 4 with its weights. */
function model({ operator = 'Gather', indices = 'input_ids', axis, packed }: Shape = {}) {
  const attribute = axis ? field(5, [...field(1, bytes(axis[0])), ...field(3, axis[1])]) : [];
  const inputs = [...field(1, bytes('table')), ...field(1, bytes(indices))];
  const node = [...inputs, ...field(2, bytes('y')), ...field(4, bytes(operator)), ...attribute];
  const dims = packed
    ? field(1, [...varint(300), ...varint(4)])
    : [...field(1, 300), ...field(1, 4)];
  const table = [...dims, ...field(2, 1), ...field(8, bytes('table')), ...field(9, [1, 2, 3, 4])];
  const graph = [...field(1, node), ...field(2, bytes('g')), ...field(5, table)];
  return Uint8Array.from([...field(1, 10), ...field(7, graph), ...field(2, bytes('vlmport'))]);
}

test.each<[Shape, number | null]>([
  [{}, 300],
  [{ packed: true }, 300],
  [{ operator: 'GatherBlockQuantized', axis: ['gather_axis', 0] }, 300],
  [{ axis: ['axis', 1] }, 4],
  [{ axis: ['axis', 2] }, null],
  [{ operator: 'Mul' }, null],
  [{ indices: 'other' }, null],
])('the rows of a table are read from the graph: %j', (shape, rows) => {
  expect(tableRows(model(shape), 'input_ids')).toBe(rows);
});

test('a truncated graph is refused', () => {
  const whole = model();
  for (const length of [1, 5, 20, whole.length - 3]) {
    const cut = whole.slice(0, length);
    expect(() => tableRows(cut, 'input_ids')).toThrow(VlmportError);
  }
});

test.each([
  [300, "token 300 ('<extra>')"],
  [-1, 'token -1 '],
  [2 ** 40, 'token 1099511627776 '],
  [NaN, 'token NaN '],
])('token %d has no row', (id, named) => {
  const textOf = (token: number) => (token === 300 ? '<extra>' : undefined);
  try {
    checkIds([1, 299, id], 300, textOf);
    expect.unreachable();
  } catch (error) {
    expect(error).toMatchObject({ kind: 'PromptError', code: 'prompt.token-past-embedding' });
    expect((error as VlmportError).message).toContain(named);
  }
  checkIds([0, 299], 300, textOf);
  checkIds([], 0, textOf);
});
