/**
 * Check a tokenizer before it is used: refuse parts that make a text very long, sizes of zero, and
 * deep nesting (the twin of vlmport/text/tokenizer_checks.py).
 */

import { quoted } from '../errors.js';

const MAX_CHARACTERS = 256 * 1024 * 1024; // in a file; the largest published ones have 35 MB
const MAX_PARTS = 64;
const MAX_DEPTH = 8;
const MAX_GROWTH = 64; // characters that the parts make of one
const MAX_PATTERN = 2000; // characters
const MAX_STRIP = 64;
const NESTED = ['normalizers', 'pretokenizers', 'decoders'];
const PARTS = ['normalizer', 'pre_tokenizer', 'decoder'] as const;
const GROWTH: Readonly<Record<string, number>> = {
  NFD: 4,
  NFKC: 18,
  NFKD: 18,
  Lowercase: 2,
  ByteLevel: 4,
  BertNormalizer: 3,
};
// Regular expressions in decoders of published tokenizers; the time of each is linear in the text.
const KNOWN_PATTERNS = new Set(['\\n\\n', '\\n', '\\s', '\\s+', ' {2,}', '\\p{N}', '[0-9]', '\\d']);

type Part = Readonly<Record<string, unknown>>;

/** List the problems of the text and the parts of tokenizer.json. */
export function problemsOf(text: string, raw: unknown): string[] {
  if (text.length > MAX_CHARACTERS) return [`${text.length} characters, at most ${MAX_CHARACTERS}`];
  return PARTS.flatMap(name => {
    const part = isPart(raw) ? raw[name] : null;
    if (depth(part) > MAX_DEPTH) return [`${name}: nested more than ${MAX_DEPTH} times`];
    const steps = stepsOf(part);
    const problems = steps.flatMap(step => problemsOfStep(step, name));
    if (steps.length > MAX_PARTS) problems.push(`${steps.length} parts, at most ${MAX_PARTS}`);
    const grown = steps.reduce((product, step) => product * growth(step), 1);
    if (grown > MAX_GROWTH) {
      problems.push(`makes ${grown.toFixed()} characters of one, at most ${MAX_GROWTH}`);
    }
    return problems.map(problem => `${name}: ${problem}`);
  });
}

function problemsOfStep(step: Part, where: (typeof PARTS)[number]): string[] {
  const problems: string[] = [];
  if (step.type === 'FixedLength' && step.length === 0) problems.push('FixedLength of 0');
  if (step.type === 'Strip' && where === 'decoder') {
    const most = Math.max(Number(step.start ?? 0), Number(step.stop ?? 0));
    if (most > MAX_STRIP) problems.push(`Strip of ${most} characters, at most ${MAX_STRIP}`);
    if (step.stop)
      problems.push(`Strip of ${quoted(step.stop)} characters from the end, expected 0`);
  }
  const pattern = isPart(step.pattern) ? step.pattern.Regex : undefined;
  if (typeof pattern === 'string') {
    if (pattern.length > MAX_PATTERN) {
      problems.push(`a pattern of ${pattern.length} characters, at most ${MAX_PATTERN}`);
    } else if (where === 'decoder' && !KNOWN_PATTERNS.has(pattern)) {
      problems.push(`the pattern ${pattern.slice(0, 40)}, which is not a known one`);
    }
  }
  return problems;
}

/** Return the maximum number of characters that a step makes of one. */
function growth(step: Part): number {
  if (step.type === 'Replace') {
    const content = textOf(step.content).length;
    const old = isPart(step.pattern) ? textOf(step.pattern.String).length : 0;
    return old ? Math.max(1, content / old) : 1 + content;
  }
  if (step.type === 'Prepend') return 1 + textOf(step.prepend).length / 16; // once a text
  return GROWTH[String(step.type)] ?? 1;
}

/** List the parts without inner parts, in order. */
function stepsOf(part: unknown): Part[] {
  if (!isPart(part)) return [];
  return inner(part)?.flatMap(stepsOf) ?? [part];
}

function depth(part: unknown): number {
  if (!isPart(part)) return 0;
  return 1 + (inner(part) ?? []).reduce((most: number, one) => Math.max(most, depth(one)), 0);
}

function inner(part: Part): unknown[] | undefined {
  return NESTED.map(name => part[name]).find(value => Array.isArray(value)) as
    unknown[] | undefined;
}

function isPart(value: unknown): value is Part {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function textOf(value: unknown): string {
  return typeof value === 'string' ? value : '';
}
