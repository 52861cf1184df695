/** The reason why a graph refuses its input (the twin of vlmport/runtime/graphs/sessions.py). */

import { firstLine } from '../../errors.js';

// As vlmport/graph/refusal.py writes it, within ONNX Runtime's message.
const REFUSED = /Name:'(?:[^']*\/)?refused: (.*?) \| (.*?)' Status Message/;

/**
 * The reason and the hint of a graph that refuses its input: the name of the node that failed holds
 * them. For any other error: its first line, and `hint`.
 */
export function refusal(error: unknown, hint: string): [string, string] {
  const [, reason, told] = REFUSED.exec(error instanceof Error ? error.message : '') ?? [];
  return reason !== undefined && told !== undefined ? [reason, told] : [firstLine(error), hint];
}
