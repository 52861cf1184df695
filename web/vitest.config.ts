import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    projects: [
      { test: { name: 'unit', include: ['test/**/*.test.ts'] } },
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
