/* What trains in the Laboratory: matrices, a network, and the methods, each as its equation.
 *
 * One function, so that its text can be handed to a worker of a page that was opened from the disk, where
 * nothing can be fetched. It touches neither the page nor a clock. `lab.laboratory.reference` does the same by
 * sogrid, and tests compare the two.
 *
 * A matrix is { rows, cols, v }: v is a Float32Array, row by row; sums are taken in float64.
 */
function sogridEngine() {
  "use strict";

  // Matrices

  const matrix = (rows, cols, v = new Float32Array(rows * cols)) => ({ rows, cols, v });
  const map = ({ rows, cols, v }, f) => matrix(rows, cols, v.map(f));
  const scaled = (factor, A) => map(A, (a) => factor * a);

  /* A Bᵀ, two rows by two at a time. Nearly all the time of an update is spent here. */
  function timesTransposed(A, B) {
    const C = matrix(A.rows, B.rows);
    const [a, b, c, n, m, k] = [A.v, B.v, C.v, A.rows, B.rows, A.cols];
    for (let i = 0; i < n; i += 2) {
      const i1 = Math.min(i + 1, n - 1);
      for (let j = 0; j < m; j += 2) {
        const j1 = Math.min(j + 1, m - 1);
        let s00 = 0;
        let s01 = 0;
        let s10 = 0;
        let s11 = 0;
        for (let t = 0, p = i * k, p1 = i1 * k, q = j * k, q1 = j1 * k; t < k; t++) {
          s00 += a[p + t] * b[q + t];
          s01 += a[p + t] * b[q1 + t];
          s10 += a[p1 + t] * b[q + t];
          s11 += a[p1 + t] * b[q1 + t];
        }
        c[i * m + j] = s00;
        c[i * m + j1] = s01;
        c[i1 * m + j] = s10;
        c[i1 * m + j1] = s11;
      }
    }
    return C;
  }

  function transpose({ rows, cols, v }) {
    const T = matrix(cols, rows);
    for (let i = 0; i < rows; i++) for (let j = 0; j < cols; j++) T.v[j * rows + i] = v[i * cols + j];
    return T;
  }

  const times = (A, B) => timesTransposed(A, transpose(B));

  /* AᵀB, of the columns of both. */
  const columnProducts = (A, B) => timesTransposed(transpose(A), transpose(B));

  /* Mean of the rows of A, a matrix of one row. */
  function meanRow({ rows, cols, v }) {
    const mean = new Float64Array(cols);
    for (let i = 0; i < rows; i++) for (let j = 0; j < cols; j++) mean[j] += v[i * cols + j];
    return matrix(
      1,
      cols,
      Float32Array.from(mean, (sum) => sum / rows),
    );
  }

  /* A with f(a, r) in the place of each entry, where r is the one of a row below it. */
  const byRow = (A, row, f) => map(A, (a, at) => f(a, row.v[at % A.cols]));

  /* A − g hᵀ for rows g and h. */
  const minusOuter = (A, g, h) => map(A, (a, at) => a - g.v[Math.floor(at / A.cols)] * h.v[at % A.cols]);

  /* [A, 1]: the homogeneous coordinate; for a gradient, [A, bᵀ]. */
  function bordered(A, last) {
    const B = matrix(A.rows, A.cols + 1);
    for (let i = 0; i < A.rows; i++) {
      B.v.set(A.v.subarray(i * A.cols, (i + 1) * A.cols), i * B.cols);
      B.v[i * B.cols + A.cols] = last ? last.v[i] : 1;
    }
    return B;
  }

  function unbordered(B) {
    const [A, last] = [matrix(B.rows, B.cols - 1), matrix(1, B.rows)];
    for (let i = 0; i < B.rows; i++) {
      A.v.set(B.v.subarray(i * B.cols, (i + 1) * B.cols - 1), i * A.cols);
      last.v[i] = B.v[(i + 1) * B.cols - 1];
    }
    return [A, last];
  }

  /* (M + δI)⁻¹ by Cholesky's L Lᵀ, in float64; all NaN where that is not positive definite. U is L⁻ᵀ. */
  function tikhonovInverse({ rows: m, v }, shift) {
    const [L, U, inverse] = [new Float64Array(m * m), new Float64Array(m * m), matrix(m, m)];
    const dot = (a, i, b, j, from, to) => {
      let sum = 0;
      for (let p = i * m + from, q = j * m + from; p < i * m + to; p++, q++) sum += a[p] * b[q];
      return sum;
    };
    for (let i = 0; i < m; i++) {
      for (let j = 0; j <= i; j++) {
        const rest = v[i * m + j] + (i === j ? shift : 0) - dot(L, i, L, j, 0, j);
        L[i * m + j] = i === j ? Math.sqrt(rest) : rest / L[j * m + j];
      }
      if (!(L[i * m + i] > 0)) return map(inverse, () => NaN);
    }
    for (let j = 0; j < m; j++) {
      for (let i = j; i < m; i++) {
        U[j * m + i] = ((i === j) - dot(L, i, U, j, j, i)) / L[i * m + i];
      }
    }
    for (let i = 0; i < m; i++) {
      for (let j = 0; j <= i; j++) inverse.v[i * m + j] = inverse.v[j * m + i] = dot(U, i, U, j, i, m);
    }
    return inverse;
  }

  // Random numbers that Python draws too: the k-th of a stream is a hash of its path and k

  function mix(k) {
    k = Math.imul(k ^ (k >>> 16), 0x85ebca6b);
    k = Math.imul(k ^ (k >>> 13), 0xc2b2ae35);
    return (k ^ (k >>> 16)) >>> 0;
  }

  const step = (k) => Math.imul(k, 0x9e3779b9) >>> 0;

  /* Draws of the stream with that path of integers: uniform in (0, 1), and normal. */
  function random(...path) {
    const key = path.reduce((key, part) => mix(key + step(part + 1)), 0);
    let count = 0;
    const uniform = () => (mix(key + step(++count)) + 0.5) / 2 ** 32;
    const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
    return { uniform, normal };
  }

  const [WEIGHTS, ORDER, DRAWS] = [0, 1, 2];

  // The network: layers a = W h + b, h = activation(a)

  const sigmoid = (a) => 1 / (1 + Math.exp(-a));

  /* The slope is told from h; at most it is `steepest`. */
  const ACTIVATIONS = {
    sigmoid: { of: sigmoid, slope: (h) => h * (1 - h), steepest: 0.25 },
    tanh: { of: Math.tanh, slope: (h) => 1 - h * h, steepest: 1 },
    identity: { of: (a) => a, slope: () => 1, steepest: 1 },
  };

  /* Of one output: ℓ(f, y), ∂ℓ/∂f, a target drawn from the model, and the best f for targets of that mean. */
  const LOSSES = {
    quadratic: {
      value: (f, y) => (f - y) ** 2,
      gradient: (f, y) => 2 * (f - y),
      draw: (f, { normal }) => f + Math.SQRT1_2 * normal(),
      best: (mean) => mean,
    },
    logistic: {
      value: (f, y) => Math.max(f, 0) + Math.log1p(Math.exp(-Math.abs(f))) - y * f,
      gradient: (f, y) => sigmoid(f) - y,
      draw: (f, { uniform }) => Number(uniform() < sigmoid(f)),
      best: (mean) => Math.log(mean / (1 - mean)),
    },
  };

  /* Glorot's: W uniform with variance 2/(n_in + n_out), b = 0. */
  function network({ sizes, hidden, output }, seed) {
    return sizes.slice(1).map((n_out, i) => {
      const [n_in, { uniform }] = [sizes[i], random(seed, WEIGHTS, i)];
      const reach = Math.sqrt(6 / (n_in + n_out));
      return {
        W: map(matrix(n_out, n_in), () => (2 * uniform() - 1) * reach),
        b: matrix(1, n_out),
        activation: ACTIVATIONS[i + 2 < sizes.length ? hidden : output],
      };
    });
  }

  /* The inputs of all layers, and at the end the network's output. */
  function forward(layers, x) {
    const h = [x];
    for (const { W, b, activation } of layers) {
      h.push(byRow(timesTransposed(h.at(-1), W), b, (a, bias) => activation.of(a + bias)));
    }
    return h;
  }

  /* What vectors at the output are at every layer's pre-activations: rows g, one an example. */
  function pullback(layers, h, vectors) {
    const g = [];
    let above = vectors;
    for (let l = layers.length - 1; l >= 0; l--) {
      const { W, activation } = layers[l];
      g[l] = map(above, (a, at) => a * activation.slope(h[l + 1].v[at]));
      if (l) above = times(g[l], W);
    }
    return g;
  }

  // The methods: what is measured now and then, and the step (ΔW, Δb) of a layer

  const centred = ({ W, b, mean }) => minusOuter(W, b, mean);
  const withMean = (db, dW, mean) => byRow(db, timesTransposed(mean, dW), (d, moved) => d - moved);

  function covariance(h) {
    const mean = meanRow(h);
    const R = byRow(h, mean, (a, m) => (a - m) / Math.sqrt(h.rows));
    return { mean, C: columnProducts(R, R) };
  }

  const secondMoment = (rows) => scaled(1 / rows.rows, columnProducts(rows, rows));
  const largestSquare = ({ v }) => v.reduce((most, g) => Math.max(most, g * g), 1e-12);

  /* P = (C + (ε/α) I)⁻¹ */
  function acpInverse({ h, g }, { damping, alpha }) {
    const { mean, C } = covariance(h);
    const scale = alpha === "heuristic" ? largestSquare(g) : alpha;
    return { mean, alpha: scale, P: tikhonovInverse(C, damping / scale) };
  }

  /* ΔW = −(λ/α) [∇W − ∇b h̄ᵀ] P,  Δb = −(λ/α) ∇b − ΔW h̄ */
  function acpStep(gradient, { P, alpha }, { lr }) {
    const dW = times(scaled(-lr / alpha, centred(gradient)), P);
    return { dW, db: withMean(scaled(-lr / alpha, gradient.b), dW, gradient.mean) };
  }

  const METHODS = {
    /* ΔW = −λ ∇W,  Δb = −λ ∇b */
    sgd: {
      change: ({ W, b }, _, { lr }) => ({ dW: scaled(-lr, W), db: scaled(-lr, b) }),
    },

    /* ΔW = −λ [∇W − ∇b h̄ᵀ],  Δb = −λ ∇b − ΔW h̄ */
    centred: {
      change(gradient, _, { lr }) {
        const dW = scaled(-lr, centred(gradient));
        return { dW, db: withMean(scaled(-lr, gradient.b), dW, gradient.mean) };
      },
    },

    acp: { measure: acpInverse, change: acpStep },

    /* ACP with α = 1 and the mean of the statistics minibatch */
    nnn: {
      measure: (seen, options) => acpInverse(seen, { ...options, alpha: 1 }),
      change: (gradient, state, options) => acpStep({ ...gradient, mean: state.mean }, state, options),
    },

    /* [ΔW, Δb] = −λ (B + √ε I)⁻¹ [∇W, ∇b] (A + √ε I)⁻¹ */
    kfac: {
      draws: true,
      measure: ({ h, drawn }, { damping }) => ({
        A: tikhonovInverse(secondMoment(bordered(h)), Math.sqrt(damping)),
        B: tikhonovInverse(secondMoment(drawn), Math.sqrt(damping)),
      }),
      change({ W, b }, { A, B }, { lr }) {
        const [dW, db] = unbordered(scaled(-lr, times(B, times(bordered(W, b), A))));
        return { dW, db };
      },
    },

    /* m ← 0.9 m + 0.1 ∇,  s ← 0.999 s + 0.001 ∇²,  Δ = −λ m̂ / (√ŝ + 10⁻⁸) */
    adam: {
      unbounded: true,
      measure: ({ W, b }) => ({ t: 0, W: [map(W, () => 0), map(W, () => 0)], b: [map(b, () => 0), map(b, () => 0)] }),
      once: true,
      change(gradient, state, { lr }) {
        state.t += 1;
        const [one, two] = [1 - 0.9 ** state.t, 1 - 0.999 ** state.t];
        const move = (which) => {
          const [m, s] = state[which];
          return map(gradient[which], (g, at) => {
            m.v[at] += 0.1 * (g - m.v[at]);
            s.v[at] += 0.001 * (g * g - s.v[at]);
            return (-lr * (m.v[at] / one)) / (Math.sqrt(s.v[at] / two) + 1e-8);
          });
        };
        return { dW: move("W"), db: move("b") };
      },
    },
  };

  // An update

  const FIRST = 16;

  /* Root mean square of ΔW hᵢ + Δb over the first 16 examples and all units. */
  function moved({ dW, db }, h) {
    const n = Math.min(FIRST, h.rows);
    const some = matrix(n, h.cols, h.v.subarray(0, n * h.cols));
    const change = byRow(timesTransposed(some, dW), db, (a, b) => a + b);
    return Math.sqrt(change.v.reduce((sum, a) => sum + a * a, 0) / change.v.length);
  }

  const saturated = ({ activation }, h) =>
    h.v.reduce((count, a) => count + (activation.slope(a) < activation.steepest / 10), 0) / h.v.length;

  function addTo(A, change, keep = 1) {
    for (let i = 0; i < A.v.length; i++) A.v[i] = keep * A.v[i] + change.v[i];
    return A;
  }

  /* θ ← θ + v with v ← m v + Δ */
  function move(layer, { dW, db }, momentum) {
    if (!momentum) layer.speed = null;
    else {
      layer.speed ??= { dW: map(dW, () => 0), db: map(db, () => 0) };
      addTo(layer.speed.dW, dW, momentum);
      addTo(layer.speed.db, db, momentum);
    }
    addTo(layer.W, layer.speed?.dW ?? dW);
    addTo(layer.b, layer.speed?.db ?? db);
  }

  /* A network before its first update. */
  const begin = (task, seed) => ({
    ...{ task, seed, layers: network(task, seed), loss: LOSSES[task.loss] },
    ...{ updates: 0, method: null, epoch: -1, position: Infinity, order: null },
  });

  /* The next so many examples of an order that is drawn anew for each epoch. */
  function minibatch(run, size) {
    const { x, y } = run.task;
    if (run.position + size > x.rows) {
      const { uniform } = random(run.seed, ORDER, ++run.epoch);
      const keys = Float64Array.from(x.v.subarray(0, x.rows), uniform);
      run.order = Uint32Array.from(keys.keys()).sort((i, j) => keys[i] - keys[j]);
      run.position = 0;
    }
    const chosen = run.order.subarray(run.position, (run.position += size));
    const rows = ({ cols, v }) => {
      const some = matrix(size, cols);
      chosen.forEach((from, to) => some.v.set(v.subarray(from * cols, (from + 1) * cols), to * cols));
      return some;
    };
    return [rows(x), rows(y)];
  }

  /* One update in pieces, between which whoever runs it may do something else; returns what was seen.
   *
   * options: method, lr (λ), damping (ε), alpha (α or "heuristic"), every (N), bound (κ or Infinity),
   * momentum, batch. Statistics are those of the update's own minibatch.
   */
  function* update(run, options) {
    const { layers, loss } = run;
    const method = METHODS[options.method];
    if (run.method !== options.method) layers.forEach((layer) => (layer.state = layer.speed = null));
    run.method = options.method;

    const [x, y] = minibatch(run, options.batch);
    const h = forward(layers, x);
    const f = h.at(-1);
    const value = f.v.reduce((sum, out, at) => sum + loss.value(out, y.v[at]), 0) / x.rows;
    yield;
    const g = pullback(
      layers,
      h,
      map(f, (out, at) => loss.gradient(out, y.v[at])),
    );
    yield;

    const due = method.once ? !layers[0].state : !layers[0].state || run.updates % options.every === 0;
    if (method.measure && due) {
      const stream = random(run.seed, DRAWS, run.updates);
      const score = (out) => loss.gradient(out, loss.draw(out, stream));
      const drawn = method.draws ? pullback(layers, h, map(f, score)) : [];
      for (const [l, { W, b }] of layers.entries()) {
        layers[l].state = method.measure({ h: h[l], g: g[l], drawn: drawn[l], W, b }, options);
        yield;
      }
    }

    const changes = [];
    for (const [l, layer] of layers.entries()) {
      const gradient = { W: scaled(1 / x.rows, columnProducts(g[l], h[l])), b: meanRow(g[l]), mean: meanRow(h[l]) };
      const change = method.change(gradient, layer.state, options);
      const wanted = moved(change, h[l]);
      const share = method.unbounded ? 1 : Math.min(1, options.bound / wanted) || 1;
      move(
        layer,
        share < 1 ? { dW: scaled(share, change.dW), db: scaled(share, change.db) } : change,
        method.unbounded ? 0 : options.momentum,
      );
      changes.push({ wanted, taken: share * wanted });
      yield;
    }
    run.updates += 1;
    return {
      loss: value,
      changes,
      saturated: layers.map((layer, l) => saturated(layer, h[l + 1])).slice(0, -1),
    };
  }

  /* Statistics are taken anew at the next update. */
  function forget({ method, layers }) {
    if (method && !METHODS[method].once) layers.forEach((layer) => (layer.state = null));
  }

  /* An update at once. */
  function updated(run, options) {
    const pieces = update(run, options);
    for (;;) {
      const { done, value } = pieces.next();
      if (done) return value;
    }
  }

  /* The loss of the best answer that is the same for all examples. */
  function constantLoss({ y, loss }) {
    const { best, value } = LOSSES[loss];
    const f = map(meanRow(y), best);
    return y.v.reduce((sum, target, at) => sum + value(f.v[at % y.cols], target), 0) / y.rows;
  }

  const outputs = (run, x) => forward(run.layers, x).at(-1);

  return {
    matrix,
    times,
    timesTransposed,
    tikhonovInverse,
    random,
    begin,
    update,
    updated,
    forget,
    outputs,
    constantLoss,
    sigmoid,
    METHODS,
  };
}
