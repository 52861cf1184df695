/**
 * Record the runs of ONNX Runtime: where a test has put `onRun` into the worker
 * (TestServer.workerPrelude), it is called with the shapes of each run's inputs.
 */

import type * as Ort from 'onnxruntime-web';

export type Fed = Readonly<Record<string, readonly number[]>>;

export function counted(real: typeof Ort.InferenceSession): typeof Ort.InferenceSession {
  const { onRun } = globalThis as { onRun?: (fed: Fed) => void };
  if (onRun === undefined) return real;
  const create = async (...given: Parameters<typeof real.create>) => {
    const session = await real.create(...given);
    const run = session.run.bind(session);
    session.run = (feeds: Ort.InferenceSession.FeedsType, ...rest: []) => {
      onRun(Object.fromEntries(Object.entries(feeds).map(([name, one]) => [name, one.dims])));
      return run(feeds, ...rest);
    };
    return session;
  };
  return { create } as typeof real;
}
