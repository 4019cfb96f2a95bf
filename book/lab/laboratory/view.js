/* What the reader sees and moves; see `lab.laboratory` for the HTML it finds.
 *
 * Each lane has an engine of its own, a worker made of the text of this page where the browser allows one, else
 * slices of the page's own thread. Reports are kept as they come, and drawn once a frame. For tests and the
 * curious the laboratory is at `root.laboratory`.
 */
function sogridLaboratory(root) {
  "use strict";

  const UPDATES = 2000; // of a run, before it pauses by itself
  const BOUND = 0.1; // the κ that is offered
  const PICTURE = { digits: [10, 14, 14], crescents: [1, 48, 30] };
  const [WIDE, HIGH] = [4, 2.5]; // the plane of the crescents, from (0, 0.5)
  const LOST = {
    infinite: "Diverged: the loss is no number any more.",
    above: "Diverged: the loss stays above where it began.",
    saturated: "Stuck: units are saturated, the loss stands still.",
  };
  const content = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const engine = sogridEngine();
  const find = (selector, within = root) => within.querySelector(selector);
  const menus = [...root.querySelectorAll(".bench [data-menu]")];
  const chosen = Object.fromEntries(menus.map((menu) => [menu.dataset.menu, menu.value]));

  // Examples

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  function examples(name, { packed, levels, show, floats }) {
    if (packed) {
      const pixels = new Float32Array(2 * bytes(packed).length);
      bytes(packed).forEach((pair, i) => {
        pixels[2 * i] = Math.floor(pair / levels) / (levels - 1);
        pixels[2 * i + 1] = (pair % levels) / (levels - 1);
      });
      const x = engine.matrix(pixels.length / 196, 196, pixels);
      const shown = Float32Array.from(show.flatMap((i) => [...pixels.subarray(196 * i, 196 * (i + 1))]));
      return { x, y: x, show: engine.matrix(show.length, 196, shown) };
    }
    const rows = new Float32Array(bytes(floats).buffer);
    const column = (j) => rows.filter((_, at) => at % 3 === j);
    const n = rows.length / 3;
    const [, across, down] = PICTURE[name];
    const grid = Float32Array.from({ length: 2 * across * down }, (_, at) => {
      const cell = at >> 1;
      return at % 2
        ? 0.5 + HIGH * (1 - (Math.floor(cell / across) + 0.5) / down)
        : (WIDE * ((cell % across) + 0.5)) / across;
    });
    return {
      x: engine.matrix(
        n,
        2,
        rows.filter((_, at) => at % 3 < 2),
      ),
      y: engine.matrix(n, 1, column(2)),
      show: engine.matrix(across * down, 2, grid),
    };
  }

  const tasks = Object.fromEntries(
    Object.entries(content.tasks).map(([name, task]) => [name, { ...task, ...examples(name, task) }]),
  );
  for (const task of Object.values(tasks)) task.constant = engine.constantLoss(task);

  // Engines

  const source = `const engine = (${sogridEngine})();
    const take = (${sogridRunner})(engine, (report) => postMessage(report), 30);
    onmessage = ({ data }) => take(data);`;

  /* Gives a lane what takes its messages. A worker may be refused at once, or when its script is to be loaded. */
  function connect(lane, report) {
    let sent = []; // until the worker is heard of
    const refused = () => {
      Object.assign(lane, { worker: null, send: sogridRunner(engine, report, 4) });
      sent.forEach(lane.send);
      nameEngine();
    };
    try {
      lane.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    } catch {
      return refused();
    }
    lane.send = (message) => {
      sent?.push(message);
      lane.worker.postMessage(message);
    };
    lane.worker.onerror = () => sent && refused();
    lane.worker.onmessage = ({ data }) => {
      sent = null;
      report(data);
    };
  }

  function nameEngine() {
    const where = lanes.every((lane) => lane.worker)
      ? "a worker for each run, beside the page"
      : "in slices on the page’s own thread, as this browser refuses it a worker";
    find(".engine").textContent = `Engine: plain JavaScript with typed arrays, ${where}. Nothing is fetched.`;
  }

  // Drawing

  const dark = () => {
    const [r, g, b] = getComputedStyle(root)
      .color.match(/[\d.]+/g)
      .map(Number);
    return r + g + b > 380;
  };

  /* On the dark page a method's colour is lighter. */
  function tint(hex) {
    if (!dark()) return hex;
    const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgb(${parts.map((part) => Math.round(part + 0.4 * (255 - part))).join(" ")})`;
  }

  /* A canvas in the page's pixels, cleared. */
  function paper(canvas) {
    const [width, height, ratio] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio || 1];
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const c = canvas.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    const { color, fontFamily } = getComputedStyle(root);
    Object.assign(c, { fillStyle: color, strokeStyle: color, font: `12px ${fontFamily}`, lineWidth: 1 });
    return [c, width, height, color];
  }

  const short = (v) => (v >= 1000 ? v.toFixed(0) : Number(v.toPrecision(v >= 100 ? 3 : 2)).toString());

  /* About so many round places from 0 to most. */
  function ticks(most, many) {
    const rough = most / many;
    const size = 10 ** Math.floor(Math.log10(rough));
    const step = size * [1, 2, 5, 10].find((factor) => factor * size >= rough);
    return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
  }

  function logTicks(low, high) {
    const found = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** decade);
    }
    const inside = found.filter((v) => v >= low && v <= high);
    return inside.length > 5 ? inside.filter((v) => Math.log10(v) % 1 === 0) : inside;
  }

  function drawChart(canvas) {
    const [c, width, height, ink] = paper(canvas);
    const column = canvas.dataset.axis === "updates" ? 0 : 1;
    const [left, right, top, bottom] = [44, 8, 8, 20];
    const first = Math.max(...lanes.map((lane) => lane.points[2] ?? 0));
    if (!first) return;
    let [low, high, most] = [first / 1.5, first * 1.1, column ? 0.1 : 20];
    for (const { points } of lanes) {
      for (let i = 0; i < points.length; i += 3) {
        if (!Number.isFinite(points[i + 2])) continue;
        low = Math.min(low, points[i + 2] / 1.1);
        high = Math.max(high, Math.min(points[i + 2] * 1.1, first * 4));
        most = Math.max(most, points[i + column]);
      }
    }
    const x = (v) => left + ((width - left - right) * v) / most;
    const y = (v) => top + (height - top - bottom) * (Math.log(high / v) / Math.log(high / low));
    c.textBaseline = "middle";
    for (const v of logTicks(low, high)) {
      c.globalAlpha = 0.2;
      c.fillRect(left, Math.round(y(v)), width - left - right, 1);
      c.globalAlpha = 1;
      c.textAlign = "right";
      c.fillText(short(v), left - 6, y(v));
    }
    for (const v of ticks(most, width > 300 ? 5 : 3)) {
      c.textAlign = x(v) > width - 24 ? "right" : "center";
      c.fillText(short(v), Math.min(x(v), width - 2), height - 8);
    }
    c.save();
    c.beginPath();
    c.rect(left, 0, width - left, height - bottom + 2);
    c.clip();
    const level = Math.round(y(tasks[chosen.task].constant)) + 0.5;
    c.setLineDash([1, 3]);
    c.beginPath();
    c.moveTo(left, level);
    c.lineTo(width - right, level);
    c.stroke();
    for (const lane of lanes) {
      const { points } = lane;
      c.strokeStyle = tint(lane.method.color);
      c.setLineDash(lane.dash);
      c.lineWidth = 1.75;
      c.beginPath();
      const stride = 3 * Math.ceil(points.length / 3 / 1000);
      for (let i = 0; i < points.length; i += stride) {
        if (Number.isFinite(points[i + 2])) c.lineTo(x(points[i + column]), y(Math.max(points[i + 2], 1e-12)));
      }
      c.stroke();
    }
    c.restore();
    c.fillStyle = ink;
  }

  /* Grey pixels, 0 white, as digits are printed. */
  function drawDigits({ canvas, picture }) {
    const [c, width] = paper(canvas);
    const [many, across, down] = PICTURE.digits;
    const side = Math.min(40, Math.floor(width / many) - 2);
    const rows = [tasks.digits.show.v.map((v) => 255 * v), picture];
    rows.forEach((values, row) => {
      for (let d = 0; d < many; d++) {
        const image = new ImageData(across, down);
        for (let i = 0; i < across * down; i++) {
          image.data.fill(255 - values[across * down * d + i], 4 * i, 4 * i + 3);
          image.data[4 * i + 3] = 255;
        }
        stamp(c, image, d * (side + 2), row * (side + 3), side, side);
      }
    });
  }

  /* The plane in two colours, by the probability of the second class, and the examples on it. */
  function drawPlane({ canvas, picture }) {
    const [c, width, height] = paper(canvas);
    const [, across, down] = PICTURE.crescents;
    const image = new ImageData(across, down);
    const [one, two, middle] = dark()
      ? [
          [40, 66, 120],
          [122, 70, 18],
          [36, 40, 48],
        ]
      : [
          [150, 180, 255],
          [255, 196, 140],
          [250, 250, 250],
        ];
    picture.forEach((p, i) => {
      const end = p < 128 ? one : two;
      const share = Math.abs(p - 127.5) / 127.5;
      for (let k = 0; k < 3; k++) image.data[4 * i + k] = middle[k] + share * (end[k] - middle[k]);
      image.data[4 * i + 3] = 255;
    });
    const w = Math.min(width, (height * WIDE) / HIGH);
    c.imageSmoothingEnabled = true;
    stamp(c, image, 0, 0, w, height);
    const { x, y } = tasks.crescents;
    for (let i = 0; i < x.rows; i++) {
      const [px, py] = [(w * x.v[2 * i]) / WIDE, height * (1 - (x.v[2 * i + 1] - 0.5) / HIGH)];
      c.beginPath();
      if (y.v[i]) c.rect(px - 2, py - 2, 4, 4);
      else c.arc(px, py, 2.4, 0, 7);
      if (y.v[i]) c.fill();
      else c.stroke();
    }
  }

  const stamps = document.createElement("canvas");
  function stamp(c, image, ...place) {
    [stamps.width, stamps.height] = [image.width, image.height];
    stamps.getContext("2d").putImageData(image, 0, 0);
    c.drawImage(stamps, ...place);
  }

  /* Left: how much of each hidden layer is saturated. Right: how far an update moves each layer, and κ. */
  function drawMeters(lane) {
    const [c, width, height, ink] = paper(lane.meters);
    const half = width / 2 - 8;
    const sizes = content.tasks[chosen.task].sizes;
    const line = (height - 18) / (sizes.length - 1);
    c.textBaseline = "top";
    c.fillText("saturated units", 0, 0);
    c.fillText("change of pre-activations", half + 16, 0);
    c.textBaseline = "middle";
    const bar = (left, row, share, alpha) => {
      c.fillStyle = tint(lane.method.color);
      c.globalAlpha = alpha;
      c.fillRect(left, 18 + row * line + 2, Math.max(0, Math.min(1, share)) * (half - 48), line - 4);
      c.globalAlpha = 1;
      c.fillStyle = ink;
    };
    const amount = (v) => (Number.isFinite(v) ? (v >= 1e-3 ? short(v) : v ? "< 10⁻³" : "–") : "∞");
    const log = (v) => (Math.log10(v) + 4) / 5; // from 0.0001 to 10
    sizes.slice(1).forEach((_, l) => {
      const middle = 18 + (l + 0.5) * line;
      if (l < sizes.length - 2) {
        bar(0, l, 1, 0.12);
        bar(0, l, lane.saturated?.[l] ?? 0, 1);
        c.fillText(`${Math.round(100 * (lane.saturated?.[l] ?? 0))} %`, half - 44, middle);
      }
      const { wanted, taken } = lane.changes?.[l] ?? { wanted: 0, taken: 0 };
      bar(half + 16, l, 1, 0.12);
      bar(half + 16, l, log(wanted), 0.4);
      bar(half + 16, l, log(taken), 1);
      c.fillText(amount(taken), 2 * half - 28, middle);
    });
    if (lane.options.bound < Infinity && lane.uses("bound")) {
      c.fillRect(half + 16 + log(lane.options.bound) * (half - 48) - 1, 16, 2, height - 16);
    }
  }

  // A lane: one network, one method, its sliders

  class Lane {
    constructor(element, at) {
      const canvas = find(".picture", element);
      Object.assign(this, { element, canvas, meters: find(".meters", element), letter: element.dataset.lane });
      this.dash = at ? [5, 3] : [];
      this.picked = find("select", element);
      this.inputs = Object.fromEntries(
        [...element.querySelectorAll("[data-option]")].map((e) => [e.dataset.option, e]),
      );
      connect(this, (report) => this.take(report));
      this.name = this.picked.value;
      this.picked.addEventListener("change", () => this.pick());
      for (const input of Object.values(this.inputs)) input.addEventListener("input", () => this.set());
      this.points = [];
      this.words();
    }

    get method() {
      return content.methods[this.name];
    }

    uses(option) {
      return this.method.uses.includes(option);
    }

    get options() {
      const value = ([name, input]) => [name, content.values[name][input.value]];
      const options = Object.fromEntries(Object.entries(this.inputs).map(value));
      return {
        ...options,
        bound: options.bound === "none" ? Infinity : options.bound,
        method: this.method.engine,
        batch: Number(chosen.batch),
        speed: Number(chosen.speed) || Infinity,
      };
    }

    /* The method's own values to begin with: a λ means something else to each. */
    pick() {
      this.name = this.picked.value;
      const own = this.method[chosen.task];
      for (const [name, input] of Object.entries(this.inputs)) {
        if (name === "bound" || name === "every") continue;
        input.value = name in own ? content.values[name].indexOf(own[name]) : content.start[name];
      }
      this.set();
    }

    set() {
      this.words();
      this.send({ options: this.options });
      this.tell();
      wake();
    }

    words() {
      for (const [name, input] of Object.entries(this.inputs)) {
        const word = content.words[name][input.value];
        input.setAttribute("aria-valuetext", word);
        input.disabled = !this.uses(name);
        input.parentElement.classList.toggle("unused", input.disabled);
        find("output", input.parentElement).textContent = word;
      }
    }

    begin() {
      const { x, y, sizes, hidden, output, loss, show } = tasks[chosen.task];
      const task = { x, y, sizes, hidden, output, loss };
      this.run = (this.run ?? 0) + 1;
      Object.assign(this, { points: [], picture: null, lost: null, changes: null, saturated: null, updates: 0 });
      this.send({
        begin: { task, seed: Number(chosen.seed), show, run: this.run },
        options: this.options,
        until: UPDATES,
      });
    }

    take({ run, points, ...report }) {
      if (run !== this.run) return; // of one that was begun before
      this.points.push(...points);
      const lost = report.lost !== this.lost;
      Object.assign(this, report);
      if (lost) this.warn();
      if (!report.running) settle();
      this.tell();
      wake();
    }

    warn() {
      const place = find(".lost", this.element);
      place.textContent = this.lost ? `${LOST[this.lost]} ` : "";
      if (!this.lost || !this.uses("bound") || this.options.bound < Infinity) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `Start again with the bound κ = ${BOUND}`;
      button.addEventListener("click", () => {
        this.inputs.bound.value = content.values.bound.indexOf(BOUND);
        this.words();
        this.begin();
        place.textContent = "";
        if (!running) toggle();
        else this.send({ run: true });
      });
      place.append(button);
    }

    get sentence() {
      const loss = this.points.at(-1);
      if (loss === undefined) return "";
      const each = short((1000 * this.seconds) / Math.max(1, this.updates));
      const so = `${this.updates} updates in ${this.seconds.toFixed(1)} s, ${each} ms each`;
      return `loss ${Number.isFinite(loss) ? short(loss) : "∞"} · ${so}`;
    }

    tell() {
      find(".reading", this.element).textContent = this.sentence || "–";
      find("svg line", this.element).style.strokeDasharray = this.dash.join(" ");
    }

    draw() {
      find("svg line", this.element).style.stroke = tint(this.method.color);
      if (this.picture) (chosen.task === "digits" ? drawDigits : drawPlane)(this);
      drawMeters(this);
    }
  }

  // The whole

  let [running, visible, waiting, drawn] = [false, false, false, 0];
  const lanes = [];
  for (const [at, element] of root.querySelectorAll(".lane").entries()) lanes.push(new Lane(element, at));
  const charts = [...root.querySelectorAll(".chart")];
  const go = find('[data-do="run"]');

  function draw() {
    waiting = false;
    drawn = performance.now();
    charts.forEach(drawChart);
    for (const lane of lanes) lane.draw();
  }

  /* At most once a frame; once a second for whoever wants things calm. */
  function wake() {
    if (waiting) return;
    waiting = true;
    const rest = calm ? drawn + 1000 - performance.now() : 0;
    if (rest > 0) setTimeout(() => requestAnimationFrame(draw), rest);
    else requestAnimationFrame(draw);
  }

  function send() {
    for (const lane of lanes) lane.send({ run: running && visible });
  }

  function toggle(on = !running) {
    running = on;
    go.textContent = running ? "Pause" : "Train";
    if (running) {
      const until = Math.max(...lanes.map((lane) => lane.updates)) >= UPDATES ? UPDATES : 0;
      for (const lane of lanes) lane.send({ run: visible, until: until && lane.updates + UPDATES });
    } else send();
    say();
  }

  /* When no lane has anything left to do. */
  function settle() {
    if (!running || !visible || lanes.some((lane) => lane.running || !lane.updates)) return;
    toggle(false);
  }

  /* What has been seen, in words: read out when the reader stops, or what was running ends. */
  function say() {
    const of = (lane) => `${lane.letter}, ${lane.method.name}: ${lane.sentence}.`;
    const words = lanes
      .filter((lane) => lane.sentence)
      .map(of)
      .join(" ");
    find(".status").textContent = running ? "" : words;
    for (const [i, chart] of charts.entries()) {
      chart.setAttribute("aria-label", `Loss by ${i ? "second" : "update"} of both runs. ${words}`);
    }
  }

  function label() {
    const digits = chosen.task === "digits";
    root.dataset.task = chosen.task;
    for (const { canvas, meters, letter } of lanes) {
      const what = digits
        ? "Ten digits, and below them what the network makes of them."
        : "The plane, coloured by the class that the network expects, and the examples.";
      canvas.setAttribute("aria-label", `Run ${letter}. ${what}`);
      meters.setAttribute(
        "aria-label",
        `Run ${letter}. By layer: the share of saturated units, and the change of pre-activations in one update beside the bound.`,
      );
    }
  }

  function begin() {
    for (const lane of lanes) lane.begin();
    label();
    say();
    if (running) send();
  }

  root.addEventListener("click", ({ target }) => {
    const what = target.closest("[data-do]")?.dataset.do;
    if (what === "run") toggle();
    if (what === "begin") begin();
    if (what === "once") {
      if (running) toggle(false);
      for (const lane of lanes) lane.send({ once: true });
    }
  });
  const CHOSEN = {
    task() {
      const speed = chosen.task === "digits" ? "0" : "100"; // the crescents would be over in a second
      find('[data-menu="speed"]').value = chosen.speed = speed;
      for (const lane of lanes) lane.pick();
      begin();
    },
    seed: begin,
    batch: () => lanes.forEach((lane) => lane.set()),
    speed: () => lanes.forEach((lane) => lane.set()),
  };
  for (const menu of menus) {
    menu.addEventListener("change", () => {
      chosen[menu.dataset.menu] = menu.value;
      CHOSEN[menu.dataset.menu]();
    });
  }

  nameEngine();
  new MutationObserver(wake).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  new ResizeObserver(wake).observe(root);
  begin();

  /* It trains while it is seen. */
  function see(on) {
    visible = on && !document.hidden;
    send();
  }
  let seen = false;
  new IntersectionObserver(([entry]) => {
    const first = entry.isIntersecting && !seen && !calm;
    seen ||= entry.isIntersecting;
    see(entry.isIntersecting);
    if (first) toggle(true);
  }).observe(root);
  document.addEventListener("visibilitychange", () => see(root.getBoundingClientRect().bottom > 0));

  root.laboratory = {
    engine,
    tasks,
    lanes,
    toggle,
    begin,
    get running() {
      return running;
    },
  };
}
