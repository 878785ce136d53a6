// SPDX-License-Identifier: Apache-2.0
// llama.cpp behind standard input: each line {prompts, outputLength} is answered with a line {seconds, tokens}.
//
//     node llama_cpp.mjs MODEL.gguf THREADS
//
// perf/cpu_peer.py installs node-llama-cpp beside a copy of this file. Greedy, past any end of sequence.
import {createInterface} from "node:readline";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, threads] = [process.argv[2], Number(process.argv[3])];
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads});
const model = await llama.loadModel({modelPath});
const contexts = new Map();

async function sequencesOf(count) {
  if (!contexts.has(count)) {
    const context = await model.createContext({sequences: count, contextSize: 1024, batchSize: 512, threads});
    contexts.set(count, Array.from({length: count}, () => context.getSequence()));
  }
  return contexts.get(count);
}

async function generate(sequence, prompt, outputLength) {
  let tokens = 0;
  for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
    if (++tokens === outputLength) break;
  return tokens;
}

console.log(JSON.stringify({features: llama.systemInfo}));
for await (const line of createInterface({input: process.stdin})) {
  const {prompts, outputLength} = JSON.parse(line);
  const sequences = await sequencesOf(prompts.length);
  for (const sequence of sequences) await sequence.clearHistory();
  const started = performance.now();
  const counts = await Promise.all(prompts.map((prompt, i) => generate(sequences[i], prompt, outputLength)));
  const seconds = (performance.now() - started) / 1e3;
  console.log(JSON.stringify({seconds, tokens: counts.reduce((sum, count) => sum + count, 0)}));
}
process.exit(0);
