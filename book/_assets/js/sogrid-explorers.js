/* The explorers of a page: see book/lab/explorers/core.py for the HTML it finds, and for what leaves mean.
 *
 * `resolve` and `short` are its functions of these names, line by line. A state is one index per control;
 * where it is drawn, the element says so (`data-shown`, for whoever waits). Formulas are in
 * sogrid-formulas.js.
 */
(() => {
  "use strict";

  const PACE = 250; // milliseconds of a step when a slider plays
  const TYPES = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, i4: Int32Array };

  /* An array as the browser's own: nested lists whose innermost are typed. */
  function decode({ type, shape, data }) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const flat = new TYPES[type](bytes.buffer);
    const nest = (at, size, [n, ...rest]) =>
      rest.length
        ? Array.from({ length: n }, (_, i) => nest(at + (i * size) / n, size / n, rest))
        : flat.subarray(at, at + n);
    return shape.length ? nest(0, flat.length, shape) : flat[0];
  }

  /* Arrays in the place of references to them: one object each, so that plotly sees what has not changed. */
  function link(node, arrays) {
    if (node?.$ === "array") return arrays[node.of];
    if (Array.isArray(node)) return node.map((part) => link(part, arrays));
    if (node && typeof node === "object")
      return Object.fromEntries(Object.entries(node).map(([key, part]) => [key, link(part, arrays)]));
    return node;
  }

  function short(value) {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "–" : value > 0 ? "∞" : "−∞";
    let digits = 2;
    let size = Math.abs(value);
    for (; 0 < size && size < 1 && digits < 8; digits++) size *= 10;
    for (; size >= 10 && digits > 0; digits--) size /= 10;
    const text = value.toFixed(digits);
    return (text.includes(".") ? text.replace(/\.?0+$/, "") : text).replace("-", "−");
  }

  const product = (a, b) =>
    a.length === undefined
      ? b.length === undefined
        ? a * b
        : Array.from(b, (v) => a * v)
      : Array.from(a, (v, i) => v * (b.length === undefined ? b : b[i]));

  function resolve(node, state, out) {
    const goOn = (part) => resolve(part, state, out);
    if (node === null || typeof node !== "object" || ArrayBuffer.isView(node)) return node;
    switch (node.$) {
      case "at": {
        let value = node.of.$ ? goOn(node.of) : node.of;
        for (const place of node.by) value = value[typeof place === "string" ? state[place] : goOn(place)];
        return goOn(value);
      }
      case "first":
        return goOn(node.of).slice(0, goOn(node.count));
      case "times":
        return node.of.map(goOn).reduce(product);
      case "short":
        return short(goOn(node.of));
      case "out":
        return node.path.reduce((value, name) => value[name], out);
    }
    if (Array.isArray(node)) return node.some(leafy) ? node.map(goOn) : node;
    return Object.fromEntries(Object.entries(node).map(([key, part]) => [key, goOn(part)]));
  }

  const leafy = (node) => node !== null && typeof node === "object" && !ArrayBuffer.isView(node);
  const depends = (node) => leafy(node) && ("$" in node || Object.values(node).some(depends));

  class Explorer {
    constructor(root) {
      const content = JSON.parse(root.querySelector("script").textContent);
      const arrays = content.arrays.map(decode);
      Object.assign(this, content, { root, plot: root.querySelector(".sogrid-plot"), waiting: false });
      for (const part of ["traces", "layout", "text"]) this[part] = link(content[part], arrays);
      this.inputs = Object.fromEntries(
        [...root.querySelectorAll("[data-control]")].map((input) => [input.dataset.control, input]),
      );
      for (const input of Object.values(this.inputs)) input.addEventListener("input", () => this.change());
      for (const button of root.querySelectorAll(".sogrid-play")) this.addPlay(button);
    }

    /* A button that moves its slider to the end, step by step, until it is pressed again or the slider moved. */
    addPlay(button) {
      const input = button.parentElement.querySelector("input");
      let clock = null;
      const stop = () => {
        clearInterval(clock);
        clock = null;
        button.textContent = "Play";
      };
      const step = () => {
        input.value = Number(input.value) + 1;
        this.change();
        if (input.value === input.max) stop();
      };
      button.addEventListener("click", () => {
        if (clock !== null) return stop();
        if (input.value === input.max) input.value = 0;
        this.change();
        clock = setInterval(step, PACE);
        button.textContent = "Pause";
      });
      input.addEventListener("input", stop);
    }

    get state() {
      const position = (input) =>
        input.type === "checkbox" ? Number(input.checked) : (input.selectedIndex ?? Number(input.value));
      return Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, position(input)]));
    }

    picture(state) {
      const values = Object.fromEntries(Object.keys(state).map((name) => [name, this.controls[name][state[name]]]));
      const out = this.formula ? sogridBook.formulas[this.formula](values, this.data) : {};
      return {
        traces: resolve(this.traces, state, out),
        layout: resolve(this.layout, state, out),
        text: resolve(this.text, state, out).join(""),
      };
    }

    async start() {
      const { traces, layout } = this.picture(this.state);
      this.moving = Object.keys(this.layout).filter((key) => depends(this.layout[key]));
      /* A reader's zoom, or choice in the legend, outlives a change of the state. */
      await sogridBook.draw(this.plot, traces, { ...layout, uirevision: "kept" });
      if (this.handle) this.addHandle();
      this.tell(this.state);
    }

    /* Draws at most once a frame, however fast the input comes. */
    change() {
      for (const [name, input] of Object.entries(this.inputs)) {
        if (input.type !== "range") continue;
        const word = this.words[name][input.value];
        input.setAttribute("aria-valuetext", word);
        input.parentElement.querySelector("output").textContent = word;
      }
      if (this.waiting) return;
      this.waiting = true;
      requestAnimationFrame(async () => {
        this.waiting = false;
        await this.show(this.state);
      });
    }

    async show(state) {
      const { traces, layout, text } = this.picture(state);
      /* What plotly and the theme have put into the layout stays. */
      const now = this.plot.layout;
      for (const key of this.moving) {
        const part = layout[key];
        now[key] = Array.isArray(part) ? part : { ...now[key], ...part };
      }
      this.root.querySelector(".sogrid-result").textContent = text;
      await Plotly.react(this.plot, traces, now);
      this.tell(state);
    }

    tell(state) {
      this.root.dataset.shown = Object.values(state).join(" ");
      this.place?.();
    }

    /* A point on the picture that sets two sliders: dragged, moved by arrow keys, or put by a tap. */
    addHandle() {
      const [x, y] = this.handle.map((name) => this.inputs[name]);
      const axes = () => [this.plot._fullLayout.xaxis, this.plot._fullLayout.yaxis];
      const handle = document.createElement("button");
      handle.type = "button";
      handle.className = "sogrid-handle";
      handle.setAttribute("aria-label", "The point: drag it, or move it with the arrow keys");
      this.plot.parentElement.append(handle);

      this.place = () => {
        const [across, up] = axes();
        const at = (axis, input) => axis._offset + axis.d2p(this.controls[input.dataset.control][input.value]);
        handle.style.left = `${at(across, x)}px`;
        handle.style.top = `${at(up, y)}px`;
      };
      const set = (input, value) => {
        const values = this.controls[input.dataset.control];
        const nearest = values.reduce((best, v, i) => (Math.abs(v - value) < Math.abs(values[best] - value) ? i : best), 0);
        input.value = nearest;
      };
      const move = ({ clientX, clientY }) => {
        const [across, up] = axes();
        const box = this.plot.getBoundingClientRect();
        set(x, across.p2d(clientX - box.left - across._offset));
        set(y, up.p2d(clientY - box.top - up._offset));
        this.place();
        this.change();
      };

      handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
      handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && move(event));
      handle.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] }[event.key];
        if (!step) return;
        event.preventDefault();
        const size = event.shiftKey ? 10 : 1;
        x.value = Number(x.value) + step[0] * size;
        y.value = Number(y.value) + step[1] * size;
        this.place();
        this.change();
      });
      this.plot.addEventListener("click", (event) => event.isTrusted && event.target.closest(".nsewdrag") && move(event));
      this.plot.on("plotly_afterplot", this.place);
    }
  }

  async function start() {
    sogridBook.explorers = [];
    for (const root of document.querySelectorAll(".sogrid-explorer")) {
      const plot = root.querySelector(".sogrid-plot");
      try {
        const explorer = new Explorer(root);
        sogridBook.explorers.push(explorer);
        await explorer.start();
      } catch (error) {
        console.error(error);
        plot.textContent = plot.getAttribute("aria-label");
        plot.classList.add("sogrid-failed");
      }
    }
  }

  start();
})();
