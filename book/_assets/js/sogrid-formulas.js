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

  sogridBook.formulas = { second_order_steps };
})();
