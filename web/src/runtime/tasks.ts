/** A worker that computes hears no message; this lets them in. */

const channel = new MessageChannel();

/** Let messages in: WebAssembly never waits, so that without this no abort would be heard. */
export function nextTask(): Promise<void> {
  return new Promise(resolve => {
    channel.port1.onmessage = () => resolve();
    channel.port2.postMessage(null);
  });
}
