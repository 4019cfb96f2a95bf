/* Draws the figures of a page: see book/lab/plotting.py for the HTML it finds.
 *
 * plotly.min.js (several megabytes) is loaded once, and only on a page that shows something. Explorers
 * share it and the theme through the global `sogridBook`:
 *   sogridBook.plotly()                    a promise of the Plotly library
 *   sogridBook.draw(element, data, layout) draws, then follows the page's theme and the element's size
 * This script is deferred: an inline script of a page waits for DOMContentLoaded before it uses them.
 */
(() => {
  "use strict";

  const library = new URL("../vendor/plotly/plotly.min.js", document.currentScript.src).href;
  const touch = matchMedia("(hover: none)").matches;
  const drawn = new Set();
  let loading = null;

  function plotly() {
    loading ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = library;
      script.onload = () => resolve(window.Plotly);
      script.onerror = () => reject(new Error("plotly.min.js could not be loaded"));
      document.head.append(script);
    });
    return loading;
  }

  /* Colours of the page's theme, as updates of a figure's layout. */
  function theme() {
    const page = getComputedStyle(document.documentElement);
    const ink = page.getPropertyValue("--sogrid-ink").trim();
    const paper = page.getPropertyValue("--sogrid-paper").trim();
    return {
      "font.color": ink,
      "hoverlabel.bgcolor": paper,
      "hoverlabel.bordercolor": ink,
      "hoverlabel.font.color": ink,
      "modebar.color": ink,
    };
  }

  /* Of an axis's labels that would touch, the rounder one stays: a power of ten, or else 2 or 5 times one. */
  function thin(element) {
    const round = (text) => (/^(0\.0*)?10*[kM]?$|^10[-−]?\d+$/.test(text) ? 0 : /^(0\.0*)?[25]0*[kM]?$/.test(text) ? 1 : 2);
    const kept = {};
    const labels = [...element.querySelectorAll('svg.main-svg [class$="tick"] > text')].map((text) => {
      text.style.visibility = "";
      const rank = round(text.textContent.replaceAll("\u200b", ""));
      return { text, rank, box: text.getBoundingClientRect(), axis: (kept[text.parentNode.classList[0]] ??= []) };
    });
    const meet = (a, b, from, to) => a[from] < b[to] && b[from] < a[to];
    const overlap = (a, b) => meet(a, b, "left", "right") && meet(a, b, "top", "bottom");
    for (const { text, box, axis } of labels.sort((a, b) => a.rank - b.rank)) {
      if (axis.some((other) => overlap(box, other))) text.style.visibility = "hidden";
      else axis.push(box);
    }
  }

  /* Gives a figure the colours of the theme, which it then names (`data-drawn`, for whoever waits). */
  async function colour(element) {
    const name = document.documentElement.dataset.theme;
    await Plotly.relayout(element, theme());
    element.dataset.drawn = name ?? "true";
  }

  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.offsetWidth && target.offsetWidth !== target._fullLayout?.width) Plotly.Plots.resize(target);
    }
  });

  new MutationObserver(() => {
    drawn.forEach(colour);
  }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });

  /* To a screen reader the drawing is one image; the buttons above it stay buttons. */
  function label(element) {
    const text = element.getAttribute("aria-label");
    if (!text) return;
    element.setAttribute("role", "group");
    element.querySelectorAll("svg.main-svg").forEach((svg, i) => {
      if (i) return svg.setAttribute("aria-hidden", "true");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", text);
    });
  }

  async function draw(element, data, layout = {}) {
    const Plotly = await plotly();
    const config = {
      displaylogo: false,
      displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    };
    /* On a touch screen a drag scrolls the page instead of zooming the figure. */
    await Plotly.newPlot(element, data, { ...(touch && { dragmode: false }), ...layout, autosize: true }, config);
    element.on("plotly_afterplot", () => thin(element));
    await colour(element);
    label(element);
    drawn.add(element);
    sizes.observe(element);
    return element;
  }

  /* Paper is white: a page is printed in the light theme, whatever the screen shows. And it is narrower than a
   * screen: figures can be scaled. */
  let screen = null;
  const drawings = () => document.querySelectorAll(".sogrid-plot svg.main-svg");
  addEventListener("beforeprint", () => {
    screen = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    for (const svg of drawings()) {
      svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
    }
  });
  addEventListener("afterprint", () => {
    document.documentElement.dataset.theme = screen;
    for (const svg of drawings()) svg.removeAttribute("viewBox");
  });

  /* The text appears when its formulas are typeset (or after three seconds), and does not move then. */
  addEventListener("DOMContentLoaded", async () => {
    const patience = new Promise((resolve) => setTimeout(resolve, 3000));
    await Promise.race([Promise.resolve(window.MathJax?.startup?.promise).catch(console.error), patience]);
    document.documentElement.classList.remove("sogrid-typesetting");
  });

  async function start() {
    for (const figure of document.querySelectorAll(".sogrid-figure")) {
      const element = figure.querySelector(".sogrid-plot");
      try {
        const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
        await draw(element, data, layout);
      } catch (error) {
        console.error(error);
        element.textContent = element.getAttribute("aria-label");
        element.classList.add("sogrid-failed");
      }
    }
  }

  window.sogridBook = { plotly, draw };
  start();
})();
