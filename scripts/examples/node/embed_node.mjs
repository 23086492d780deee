// Sentence embeddings from Node: `node embed_node.mjs FOLDER`. Needs onnxruntime-node and @huggingface/tokenizers.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent."];
const folder = process.argv[2];
const read = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));

const session = await ort.InferenceSession.create(join(folder, "model.onnx"), { executionProviders: ["cpu"] });
const tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));

// Mean of the token states at length 1; one sentence at a time, so there is no padding to leave out.
async function embed(sentence) {
  const ids = tokenizer.encode(sentence).ids;
  const tensor = (value) => new ort.Tensor("int64", BigInt64Array.from(ids, value), [1, ids.length]);
  const { last_hidden_state: states } = await session.run({
    input_ids: tensor((id) => BigInt(id)),
    attention_mask: tensor(() => 1n),
    token_type_ids: tensor(() => 0n),
  });
  const width = states.dims[2];
  const sum = new Float64Array(width);
  states.data.forEach((number, index) => (sum[index % width] += number));
  const length = Math.hypot(...sum);
  return sum.map((number) => number / length);
}

const vectors = [];
for (const sentence of SENTENCES) vectors.push(await embed(sentence));
const dot = (left, right) => left.reduce((total, number, index) => total + number * right[index], 0);
for (const [left, right] of [[0, 1], [0, 2], [1, 2]]) {
  console.log(`${dot(vectors[left], vectors[right]).toFixed(4).padStart(7)}  ${SENTENCES[left]} | ${SENTENCES[right]}`);
}
