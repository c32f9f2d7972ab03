// Lines over the last two minutes, as SVG, with a list of their newest values, or of those under the pointer. Knows no server.

import { drawn, element, setText } from "./elements.js";

const WIDTH = 1000;
const HEIGHT = 100;
// A longer pause between two samples (the page was hidden) is left open.
const GAP_SECONDS = 4;

// The next round number that holds the value; a whole one where asked for.
function roundUp(value, whole) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const limits = [1, 1.5, 2, 3, 5, 8, 10].map((digit) => digit * power);
  return limits.find((limit) => limit >= value * 0.9999 && (!whole || Number.isInteger(limit)));
}

export class Chart {
  #format;
  #values;
  #name;
  #top;
  #whole;
  #lines = drawn("g", { class: "lines" });
  #mark = drawn("line", { class: "mark", y1: 0, y2: HEIGHT, visibility: "hidden" });
  #limit = element("span", { class: "limit" });
  #when = element("span", {}, "now");
  #legend = element("ul", { class: "legend" });
  #samples = [];
  #now = 0;
  #seconds = 1;
  #pointed = null;

  // values(sample) are the numbers of a sample's lines, name(sample, index) is what a line is called; top: the least height of the chart.
  constructor({ title, format, values, name, top = 0, whole = false }) {
    this.#format = format;
    this.#values = values;
    this.#name = name;
    this.#top = top;
    this.#whole = whole;
    const middle = drawn("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 });
    const size = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}, last two minutes` };
    const picture = drawn("svg", size, middle, this.#lines, this.#mark);
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      this.#pointed = (event.clientX - box.left) / box.width;
      this.#showLegend();
    });
    picture.addEventListener("pointerleave", () => {
      this.#pointed = null;
      this.#showLegend();
    });
    const plot = element("div", { class: "plot" }, picture, this.#limit);
    const scale = element("div", { class: "scale" }, element("span", {}, "2 min ago"), this.#when);
    this.node = element("figure", { class: "chart" }, element("figcaption", {}, title), this.#legend, plot, scale);
  }

  // Draws samples {time, values}; values are null where nothing was answered.
  show(samples, now, seconds) {
    this.#samples = samples;
    this.#now = now;
    this.#seconds = seconds;
    const all = samples.map((sample) => (sample.values === null ? [] : this.#values(sample.values)));
    const top = roundUp(Math.max(this.#top, ...all.flat().map((value) => value ?? 0)), this.#whole);
    setText(this.#limit, this.#format(top));
    const count = Math.max(0, ...all.map((values) => values.length));
    const paths = Array.from({ length: count }, (_, line) =>
      drawn("path", { class: `line line-${line}`, d: this.#trace(all.map((values) => values[line] ?? null), top) }),
    );
    this.#lines.replaceChildren(...paths.reverse()); // The first on top.
    this.#showLegend();
  }

  #x(time) {
    return WIDTH * (1 - (this.#now - time) / this.#seconds);
  }

  #trace(values, top) {
    let path = "";
    let last = -Infinity;
    values.forEach((value, index) => {
      if (value === null) {
        last = -Infinity;
        return;
      }
      const time = this.#samples[index].time;
      const point = `${this.#x(time).toFixed(1)} ${(HEIGHT * (1 - value / top)).toFixed(1)}`;
      // A point by itself is a line of no length, which round ends make visible.
      path += time - last > GAP_SECONDS ? `M${point}L${point}` : `L${point}`;
      last = time;
    });
    return path;
  }

  #showLegend() {
    let chosen = this.#samples.at(-1);
    if (this.#pointed !== null && chosen) {
      const time = this.#now - this.#seconds * (1 - this.#pointed);
      const distance = (sample) => Math.abs(sample.time - time);
      chosen = this.#samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best));
      const x = this.#x(chosen.time);
      this.#mark.setAttribute("x1", x);
      this.#mark.setAttribute("x2", x);
    }
    this.#mark.setAttribute("visibility", this.#pointed === null ? "hidden" : "visible");
    const seconds = this.#pointed === null || !chosen ? 0 : Math.round(this.#now - chosen.time);
    setText(this.#when, seconds === 0 ? "now" : `${seconds} s ago`);
    const values = chosen?.values ? this.#values(chosen.values) : [];
    const entries = values.map((value, line) => {
      const swatch = element("span", { class: `swatch line-${line}` });
      return element("li", {}, swatch, `${this.#name(chosen.values, line)} `, element("b", {}, this.#format(value)));
    });
    this.#legend.replaceChildren(...entries);
  }
}
