// Ask a server through one unmodified client of JavaScript, and print the answers as JSON:
// node clients.mjs CLIENT URL IMAGE    (CLIENT: openai or ai; IMAGE: a path)
import { readFile } from 'node:fs/promises';

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, jsonSchema, Output, streamText, tool } from 'ai';
import OpenAI from 'openai';

const MODEL = 'shapes-smolvlm';
const QUESTION = 'What color is the square?';
const SCHEMA = {
  type: 'object',
  properties: { color: { enum: ['red', 'blue'] } },
  required: ['color'],
  additionalProperties: false,
};

/** The official client. */
async function askOpenAI(url, image) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 });
  const content = [
    {
      type: 'image_url',
      image_url: { url: `data:image/png;base64,${image.toString('base64')}` },
    },
    { type: 'text', text: QUESTION },
  ];
  const asked = { model: MODEL, messages: [{ role: 'user', content }] };
  const whole = await client.chat.completions.create(asked);
  const streamed = [];
  let streamedUsage = null;
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    if (chunk.choices.length) streamed.push(chunk.choices[0].delta.content ?? '');
    streamedUsage = chunk.usage?.completion_tokens ?? streamedUsage;
  }
  const schema = await client.chat.completions.create({
    ...asked,
    max_tokens: 100,
    response_format: { type: 'json_schema', json_schema: { name: 'report', schema: SCHEMA } },
  });
  const tools = await client.chat.completions.create({
    ...asked,
    max_tokens: 200,
    tools: [{ type: 'function', function: { name: 'report', parameters: SCHEMA } }],
    tool_choice: { type: 'function', function: { name: 'report' } },
  });
  const call = tools.choices[0].message.tool_calls[0].function;
  const hello = [{ role: 'user', content: 'hello' }];
  const text = await client.chat.completions.create({ model: MODEL, messages: hello });
  let error = null;
  try {
    await client.chat.completions.create({ ...asked, model: 'none' });
  } catch (caught) {
    if (!(caught instanceof OpenAI.NotFoundError)) throw caught;
    error = { status: caught.status, code: caught.code, message: caught.message };
  }
  return {
    text: text.choices[0].message.content,
    answer: whole.choices[0].message.content,
    streamed,
    usage: whole.usage.completion_tokens,
    streamed_usage: streamedUsage,
    schema: schema.choices[0].message.content,
    tool: [call.name, call.arguments],
    error,
  };
}

/** The AI SDK with its provider for servers that are compatible with OpenAI's API. */
async function askAI(url, image) {
  const provider = createOpenAICompatible({
    name: 'vlmport',
    baseURL: `${url}/v1`,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  const messages = [
    {
      role: 'user',
      content: [
        { type: 'file', data: image, mediaType: 'image/png' },
        { type: 'text', text: QUESTION },
      ],
    },
  ];
  const asked = { model: provider(MODEL), messages, maxRetries: 0 };
  const whole = await generateText(asked);
  const stream = streamText(asked);
  const streamed = [];
  for await (const piece of stream.textStream) streamed.push(piece);
  const schema = await generateText({
    ...asked,
    maxOutputTokens: 100,
    output: Output.object({ schema: jsonSchema(SCHEMA) }),
  });
  const called = await generateText({
    ...asked,
    maxOutputTokens: 200,
    tools: { report: tool({ inputSchema: jsonSchema(SCHEMA) }) },
    toolChoice: { type: 'tool', toolName: 'report' },
  });
  const text = await generateText({ ...asked, messages: undefined, prompt: 'hello' });
  let error = null;
  try {
    await generateText({ ...asked, model: provider('none') });
  } catch (caught) {
    if (!APICallError.isInstance(caught)) throw caught;
    error = { status: caught.statusCode, message: caught.message };
  }
  return {
    text: text.text,
    answer: whole.text,
    streamed,
    usage: whole.usage.outputTokens,
    streamed_usage: (await stream.usage).outputTokens,
    schema: JSON.stringify(schema.output),
    tool: [called.toolCalls[0].toolName, JSON.stringify(called.toolCalls[0].input)],
    error,
  };
}

const [client, url, path] = process.argv.slice(2);
const ask = { openai: askOpenAI, ai: askAI }[client];
console.log(JSON.stringify(await ask(url, await readFile(path))));
