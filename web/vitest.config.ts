import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    projects: [
      { test: { name: 'unit', include: ['test/**/*.test.ts'] } },
      {
        test: {
          name: 'node', // run by tests/web/test_decoding.py, which makes the bundles
          include: ['node/**/*.test.ts'],
          testTimeout: 120_000,
        },
      },
      {
        test: {
          name: 'browser',
          include: ['browser/**/*.test.ts'],
          fileParallelism: false, // one Chromium at a time
          testTimeout: 300_000,
          hookTimeout: 120_000,
        },
      },
    ],
  },
});
