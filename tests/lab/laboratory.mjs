/* Runs the Laboratory's engine for test_laboratory.py: JSON in, JSON out. */
import { readFileSync } from "node:fs";

const { source, tasks, seed, runs, products, inverses } = JSON.parse(readFileSync(0, "utf8"));
const engine = new Function(`${source}; return sogridEngine();`)();
const matrix = (rows) => engine.matrix(rows.length, rows[0].length, Float32Array.from(rows.flat()));
const plain = ({ rows, cols, v }) =>
  Array.from({ length: rows }, (_, i) => Array.from(v.subarray(i * cols, (i + 1) * cols)));

const made = Object.fromEntries(
  Object.entries(tasks).map(([name, task]) => [name, { ...task, x: matrix(task.x), y: matrix(task.y) }]),
);
const losses = runs.map(({ task, options, updates }) => {
  const run = engine.begin(made[task], seed);
  const all = { ...options, bound: options.bound ?? Infinity };
  return Array.from({ length: updates }, () => engine.updated(run, all).loss);
});
console.log(
  JSON.stringify({
    losses,
    products: products.map(([A, B]) => plain(engine.times(matrix(A), matrix(B)))),
    inverses: inverses.map(([M, shift]) => plain(engine.tikhonovInverse(matrix(M), shift))),
  }),
);
