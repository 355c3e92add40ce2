// The AI SDK with its default model of OpenAI, which asks /v1/responses, and with its chat model: text, streams, tools, objects.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [, , baseUrl, name] = process.argv;
const openai = createOpenAI({ baseURL: `${baseUrl}/v1`, apiKey: "none" });
const prompt = "Who keeps the lighthouse?";
const schema = z.object({ camera: z.enum(["near", "far"]), seconds: z.number().int().min(1).max(9), isNight: z.boolean() });
const isShot = (shot) => assert.ok(schema.safeParse(shot).success, JSON.stringify(shot));
const weather = tool({
  description: "The weather of a place.",
  inputSchema: z.object({ place: z.enum(["harbour", "island"]) }),
  execute: async ({ place }) => `fog over the ${place}`,
});

async function ask(model) {
  const common = { model, prompt, maxRetries: 0 };
  const whole = await generateText({ ...common, system: "Be brief." });
  assert.equal(typeof whole.text, "string");
  assert.ok(whole.usage.outputTokens > 0, JSON.stringify(whole.usage));

  const streamed = streamText({ ...common, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of streamed.textStream) text += piece;
  assert.equal(await streamed.text, text);
  assert.ok(["stop", "length"].includes(await streamed.finishReason));

  // The first step calls, the second answers with the result before it.
  const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });
  const called = await generateText({ ...common, tools: { weather }, stopWhen: stepCountIs(2), prepareStep });
  assert.ok(called.steps[0].toolResults.length > 0 && called.steps.length === 2, JSON.stringify(called.steps[0]));
  const calls = streamText({ ...common, tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } });
  await calls.consumeStream({ onError: (error) => { throw error; } });
  assert.equal((await calls.toolCalls)[0].toolName, "weather");

  isShot((await generateObject({ ...common, schema })).object);
  const shaped = await generateText({ ...common, output: Output.object({ schema }) });
  isShot(shaped.output);
  // The answer goes back. Unless told otherwise, the SDK refers to items of responses, as if they were stored.
  const messages = [{ role: "user", content: prompt }, ...shaped.response.messages, { role: "user", content: "And at night?" }];
  const again = { model, messages, maxRetries: 0 };
  assert.equal(typeof (await generateText({ ...again, providerOptions: { openai: { store: false } } })).text, "string");
  if (model.provider.endsWith("responses")) {
    await assert.rejects(generateText(again), /no items are stored here/);
  }
  const object = streamObject({ ...common, schema, onError: ({ error }) => { throw error; } });
  for await (const _ of object.partialObjectStream);
  isShot(await object.object);
}

await ask(openai(name));
await ask(openai.chat(name));
const version = (of) => createRequire(import.meta.url)(`${of}/package.json`).version;
console.log(`ai ${version("ai")} with @ai-sdk/openai ${version("@ai-sdk/openai")}: all calls answered as expected`);
