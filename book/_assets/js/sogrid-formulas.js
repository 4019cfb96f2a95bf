/* What an explorer computes while it is steered; each is the Python function of its name, which the browser
 * tests compare it with. */
(() => {
  "use strict";

  const FAR = 100;
  const STEPS = ["gradient", "newton", "gauss_newton", "natural"];

  /* Loss, gradient and matrices [a, b, d] of ((a, b), (b, d)): book/lab/explorers/second_order.py. */
  function curvature([w1, w2], { x, y }) {
    const n = x.length;
    const mean = { loss: 0, gradient: [0, 0], newton: [0, 0, 0], gauss_newton: [0, 0, 0], natural: [0, 0, 0] };
    const add = (name, factor, entries) => entries.forEach((entry, i) => (mean[name][i] += (factor * entry) / n));
    x.forEach((input, i) => {
      const t = Math.tanh(w1 * input);
      const slope = input * (1 - t * t);
      const z = w2 * t;
      const f = (1 + Math.tanh(z / 2)) / 2;
      const J = [w2 * slope, t];
      const square = [J[0] * J[0], J[0] * J[1], J[1] * J[1]];
      mean.loss += (Math.log1p(Math.exp(-Math.abs(z))) + Math.max(z, 0) - y[i] * z) / n;
      add("gradient", f - y[i], J);
      add("natural", f * (1 - f), square);
      add("gauss_newton", (f - y[i]) ** 2, square);
      add("newton", f * (1 - f), square);
      add("newton", f - y[i], [-2 * w2 * input * t * slope, slope, 0]);
    });
    return mean;
  }

  function solve([a, b, d], damping, [u, v]) {
    const determinant = (a + damping) * (d + damping) - b * b;
    return determinant ? [((d + damping) * u - b * v) / determinant, ((a + damping) * v - b * u) / determinant] : [0, 0];
  }

  function second_order_steps({ w1, w2, lr, damping, steps }, data) {
    const { loss, newton } = curvature([w1, w2], data);
    const out = { loss, indefinite: Number(newton[0] * newton[2] - newton[1] ** 2 <= 0) };
    for (const name of STEPS) {
      const path = [[w1, w2]];
      for (let i = 0; i < steps; i++) {
        const w = path.at(-1);
        if (Math.max(...w.map(Math.abs)) >= FAR) break;
        const here = curvature(w, data);
        const step = name === "gradient" ? here.gradient : solve(here[name], damping, here.gradient);
        path.push(w.map((value, j) => value - lr * step[j]));
      }
      const [x, y] = [0, 1].map((j) => path.map((w) => w[j]));
      out[name] = { x, y, loss: curvature(path.at(-1), data).loss };
    }
    return out;
  }

  const average = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const times = (M, v) => M.map((row) => dot(row, v));

  /* book/lab/explorers/regression.py */
  function regression_lines({ mean, wish, spread, damping }, { z, noise, slope, ends }) {
    const x = z.map((v) => mean + spread * v);
    const y = z.map((v, i) => wish + slope * spread * v + noise[i]);
    const square = (of) => average(of.map((v) => v * v));
    const [h, t] = [average(x), average(y)];
    const deviations = x.map((v) => v - h);
    const steep = dot(deviations, y) / y.length / (square(deviations) + damping);
    const out = { x, y, rest: square(y) };
    for (const [name, [w, b]] of Object.entries({
      descent: [dot(x, y) / y.length, t],
      solution: [steep, t - steep * h],
    })) {
      const miss = square(x.map((v, i) => w * v + b - y[i]));
      out[name] = { y: ends.map((end) => w * end + b), slope: w, miss };
    }
    out.worse = Number(out.descent.miss > out.rest);
    return out;
  }

  /* (M + sI)/t of [a, b, d], the root of a symmetric matrix: book/lab/explorers/whitening.py. */
  function root([a, b, d]) {
    const s = Math.sqrt(a * d - b * b);
    const t = Math.sqrt(a + d + 2 * s);
    return [(a + s) / t, b / t, (d + s) / t];
  }

  function whitening({ mean1, mean2, correlation, damping, lr }, { z, error, updates, goal }) {
    const other = Math.sqrt(1 - correlation * correlation);
    const centred = z.map(([u, v]) => [u, correlation * u + other * v]);
    const moment = (i, j) => average(centred.map((h) => h[i] * h[j]));
    const [a, b, d] = root([moment(0, 0) + damping, moment(0, 1), moment(1, 1) + damping]);
    const [w, offset] = [error.slice(0, 2), error[2]];
    const shifted = offset + w[0] * mean1 + w[1] * mean2;
    const inverse = ([u, v]) => solve([a, b, d], 0, [u, v]);
    const points = {
      h: [centred.map(([u, v]) => [mean1 + u, mean2 + v]), [...w, offset]],
      centred: [centred, [...w, shifted]],
      white: [centred.map(inverse), [a * w[0] + b * w[1], b * w[0] + d * w[1], shifted]],
    };
    const out = {};
    for (const [name, [h, begin]] of Object.entries(points)) {
      const ones = h.map(([u, v]) => [u, v, 1]);
      const M = [0, 1, 2].map((i) => [0, 1, 2].map((j) => average(ones.map((row) => row[i] * row[j]))));
      let now = begin;
      const losses = [dot(now, times(M, now))];
      for (let i = 0; i < updates; i++) {
        const slope = times(M, now);
        now = now.map((value, j) => value - 2 * lr * slope[j]);
        losses.push(dot(now, times(M, now)));
      }
      const [x, y] = [0, 1].map((i) => h.map((point) => point[i]));
      const loss = losses.map((v) => v / losses[0]);
      const count = loss.findIndex((v) => v <= goal);
      out[name] = { x, y, loss, count: count < 0 ? loss.length : count };
    }
    out.diverges = Number(out.h.loss.at(-1) > 1);
    return out;
  }

  sogridBook.formulas = { second_order_steps, regression_lines, whitening };
})();
