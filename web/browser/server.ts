/** A static server for the tests, which can simulate faults. */

import { createReadStream, existsSync, readFileSync, statSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { extname, join, normalize } from 'node:path';

const TYPES: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css',
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.json': 'application/json',
  '.wasm': 'application/wasm',
  '.png': 'image/png',
  '.svg': 'image/svg+xml',
};

export interface Asked {
  readonly path: string;
  readonly range: string | null;
}

/** A fault in an answer: another status, a missing end, or a wrong byte. */
export type Fault =
  | { readonly status: number }
  | { readonly cutAfter: number }
  | { readonly flipByte: number }
  | { readonly hangAfter: number };

export class TestServer {
  /** Whether it sends COOP and COEP headers, which threads need. */
  isolated = true;
  /** Whether it supports byte ranges. */
  ranges = true;
  /** Called for each request of a file. */
  fault: (asked: Asked) => Fault | null = () => null;
  /** A script that runs before the worker's own, to change its environment. */
  workerPrelude = '';
  /** All requests, in order. */
  readonly asked: Asked[] = [];

  private constructor(
    private readonly server: http.Server,
    private readonly roots: Readonly<Record<string, string>>,
  ) {}

  /** `roots`: path prefix → folder. */
  static async start(roots: Readonly<Record<string, string>>, port = 0): Promise<TestServer> {
    const server = http.createServer();
    const test = new TestServer(server, roots);
    server.on('request', (request, response) => test.answer(request, response));
    await new Promise<void>(resolve => server.listen(port, '127.0.0.1', resolve));
    return test;
  }

  get port(): number {
    return (this.server.address() as AddressInfo).port;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}/`;
  }

  askedFor(path: string): Asked[] {
    return this.asked.filter(one => one.path.endsWith(path));
  }

  /** Break all connections. */
  breakOff(): void {
    this.server.closeAllConnections();
  }

  async stop(): Promise<void> {
    this.server.closeAllConnections();
    await new Promise(resolve => this.server.close(resolve));
  }

  private answer(request: http.IncomingMessage, response: http.ServerResponse): void {
    const path = decodeURIComponent(new URL(request.url ?? '/', this.url).pathname);
    const file = this.find(path);
    if (this.isolated) {
      response.setHeader('cross-origin-opener-policy', 'same-origin');
      response.setHeader('cross-origin-embedder-policy', 'require-corp');
    }
    if (file === null) {
      response.writeHead(404).end();
      return;
    }
    const asked = { path, range: request.headers.range ?? null };
    this.asked.push(asked);
    const fault = this.fault(asked);
    response.setHeader('content-type', TYPES[extname(file)] ?? 'application/octet-stream');
    if (fault && 'status' in fault) {
      response.writeHead(fault.status).end();
      return;
    }
    if (this.workerPrelude && /\/worker-[^/]*\.js$/.test(path)) {
      response.end(`${this.workerPrelude};\n${readFileSync(file, 'utf8')}`);
      return;
    }
    this.send(file, asked.range, fault, response);
  }

  private send(
    file: string,
    range: string | null,
    fault: Fault | null,
    response: http.ServerResponse,
  ): void {
    const { size } = statSync(file);
    const [, first, last] = (this.ranges && /^bytes=(\d+)-(\d*)$/.exec(range ?? '')) || [];
    const start = Number(first ?? 0);
    const end = last ? Number(last) : size - 1;
    response.setHeader('content-length', end - start + 1);
    if (first !== undefined) response.setHeader('content-range', `bytes ${start}-${end}/${size}`);
    response.writeHead(first === undefined ? 200 : 206);
    if (fault === null) {
      createReadStream(file, { start, end }).pipe(response);
      return;
    }
    const body = Buffer.from(readFileSync(file).subarray(start, end + 1));
    if ('cutAfter' in fault) {
      response.write(body.subarray(0, fault.cutAfter));
      setTimeout(() => response.destroy(), 200); // what was written arrives
    } else if ('hangAfter' in fault) {
      response.write(body.subarray(0, fault.hangAfter));
    } else if ('flipByte' in fault) {
      const at = fault.flipByte - start;
      if (at >= 0 && at < body.length) body[at] = body[at]! ^ 0xff;
      response.end(body);
    }
  }

  private find(path: string): string | null {
    const prefixes = Object.keys(this.roots).sort((a, b) => b.length - a.length);
    const prefix = prefixes.find(one => path.startsWith(one));
    if (prefix === undefined) return null;
    const rest = normalize(path.slice(prefix.length) || 'index.html');
    const file = join(this.roots[prefix]!, rest);
    return existsSync(file) && statSync(file).isFile() ? file : null;
  }
}
