/** Let a busy worker receive messages. */

const channel = new MessageChannel();

/** Wait for the next task. WebAssembly never waits, so without this no abort would arrive. */
export function nextTask(): Promise<void> {
  return new Promise(resolve => {
    channel.port1.onmessage = () => resolve();
    channel.port2.postMessage(null);
  });
}
