// The random stream of docs/decoding.md, written from that page alone: reads testdata/golden's
// random.json on stdin, and says on stdout what differs.
import { readFileSync } from 'node:fs';

const rotated = (word, by) => ((word << by) | (word >>> (32 - by))) >>> 0;

function mixed(word) {
  word = Math.imul(word ^ (word >>> 16), 0x21f0aaad);
  word = Math.imul(word ^ (word >>> 15), 0x735a2d97);
  return (word ^ (word >>> 15)) >>> 0;
}

const start = (seed, sequence) =>
  [1, 2, 3, 4].map(n => mixed((seed + Math.imul(4 * sequence + n, 0x9e3779b9)) | 0));

function nextWord(s) {
  const word = Math.imul(rotated(Math.imul(s[1], 5), 7), 9) >>> 0;
  const shifted = s[1] << 9;
  s[2] ^= s[0];
  s[3] ^= s[1];
  s[1] ^= s[2];
  s[0] ^= s[3];
  s[2] ^= shifted;
  s[3] = rotated(s[3], 11);
  return word;
}

function uniform(s) {
  const high = nextWord(s) >>> 5;
  return (high * 2 ** 26 + (nextWord(s) >>> 6)) / 2 ** 53;
}

function drawSeveral(scores, count, s) {
  const top = Math.max(...scores);
  const weights = scores.map(score => Math.floor(Math.exp(score - top) * 2 ** 32));
  const drawn = [];
  while (drawn.length < count) {
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    if (total === 0) break;
    let left = Math.floor(uniform(s) * total);
    const at = weights.findIndex(weight => (left -= weight) < 0);
    drawn.push(at);
    weights[at] = 0;
  }
  const rest = scores.map((_, n) => n).filter(n => !drawn.includes(n));
  rest.sort((a, b) => scores[b] - scores[a] || a - b);
  return [...drawn, ...rest].slice(0, count);
}

const golden = JSON.parse(readFileSync(0, 'utf8'));
const compared = { words: 0, uniform: 0, draws: 0 };

function same(kind, found, expected) {
  if (JSON.stringify(found) !== JSON.stringify(expected)) {
    console.log(`${kind}: ${JSON.stringify(found)}, expected ${JSON.stringify(expected)}`);
  }
  compared[kind] += expected.length;
}

const times = (count, make) => Array.from({ length: count }, make);

const plain = golden['xoshiro128**'];
const state = [...plain.state];
same('words', times(plain.words.length, () => nextWord(state)), plain.words);
for (const { seed, sequence, words, uniform: numbers, ...expected } of golden.streams) {
  same('words', start(seed, sequence), expected.state);
  const one = start(seed, sequence);
  same('words', times(words.length, () => nextWord(one)), words);
  const other = start(seed, sequence);
  same('uniform', times(numbers.length, () => uniform(other)), numbers);
}
for (const { seed, scores, count, drawn } of golden.draws) {
  same('draws', drawSeveral(scores, count, start(seed, 0)), drawn);
}
console.log(JSON.stringify(compared));
