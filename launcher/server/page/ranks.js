// The ranks: which part of the model each owns, what a step takes, and what it reads. Few are cards, many are a table.

import { element, makeBar, setText } from "./elements.js";
import * as numbers from "./numbers.js";

const MOST_CARDS = 4;

// What is split: words, a short word for a column, and the field of a rank.
const DIMENSIONS = [
  ["Query heads", "Heads", "heads"],
  ["Key-value heads", "KV heads", "kv_heads"],
  ["Hidden rows", "Hidden", "hidden_rows"],
  ["Intermediate rows", "Intermediate", "intermediate_rows"],
  ["Vocabulary rows", "Vocabulary", "vocab_rows"],
];

// The full sizes that shares are taken of: ends of the last ranks, sums of bytes, the slowest step.
function measureAll(ranks) {
  const largest = (read) => Math.max(0, ...ranks.map((rank) => read(rank) ?? 0));
  return {
    ...Object.fromEntries(DIMENSIONS.map(([, , field]) => [field, largest((rank) => rank[field]?.[1])])),
    weightBytes: ranks.reduce((sum, rank) => sum + (rank.weight_bytes ?? 0), 0),
    stepSeconds: largest((rank) => rank.step_seconds),
  };
}

function setOwned(bar, interval, full) {
  if (!interval || full === 0) return bar.set([[0, 0]], "not known");
  const words = `${numbers.formatInterval(interval)} of ${full}`;
  return bar.set([[interval[0] / full, interval[1] / full]], words);
}

function setStep(bar, rank, slowest) {
  const step = numbers.divide(rank.step_seconds, slowest) ?? 0;
  const gather = numbers.divide(rank.gather_seconds, slowest) ?? 0;
  bar.set([[0, Math.max(0, step - gather)], [Math.max(0, step - gather), step]], `${describeStep(rank)}`);
}

function describeStep(rank) {
  const { formatSeconds, say } = numbers;
  return say([rank.step_seconds, rank.gather_seconds], (step, gather) => `${formatSeconds(step)}, gathers ${formatSeconds(gather)}`);
}

const shareOfMemory = (rank) => numbers.divide(rank.bytes_per_second, rank.memory_bytes_per_second);

function describeBandwidth(rank) {
  const whole = numbers.formatBandwidth(rank.memory_bytes_per_second);
  const [number, unit] = numbers.formatBandwidth(rank.bytes_per_second).split(" ");
  if (unit === undefined && whole === numbers.UNKNOWN) return numbers.UNKNOWN;
  return unit === undefined || whole.endsWith(` ${unit}`) ? `${number} of ${whole}` : `${number} ${unit} of ${whole}`;
}

const withShare = (words, share) => (share === null ? words : `${words}, ${numbers.formatShare(share)}`);

class Card {
  #title = element("h3");
  #where = element("p", { class: "hint" });
  #owned = DIMENSIONS.map(([words]) => makeBar(["owned"], words));
  #words = DIMENSIONS.map(() => element("span", { class: "figure" }));
  #step = makeBar(["used", "gather"], "Step");
  #stepWords = element("span", { class: "figure" });
  #bandwidth = makeBar(["used"], "Bandwidth");
  #bandwidthWords = element("span", { class: "figure" });
  #memory = [element("span", { class: "figure" }), element("span", { class: "figure" }), element("span", { class: "figure" })];

  constructor() {
    const row = (words, bar, figure) => element("div", { class: "row" }, element("dt", {}, words), element("dd", {}, bar?.node ?? "", figure));
    this.node = element(
      "article",
      { class: "card" },
      element("header", {}, this.#title, this.#where),
      element(
        "dl",
        {},
        ...DIMENSIONS.map(([words], index) => row(words, this.#owned[index], this.#words[index])),
        row("Step", this.#step, this.#stepWords),
        row("Bandwidth", this.#bandwidth, this.#bandwidthWords),
        ...["Weights", "KV cache", "Resident memory"].map((words, index) => row(words, null, this.#memory[index])),
      ),
    );
  }

  show(rank, all) {
    setText(this.#title, `Rank ${rank.rank}`);
    setText(this.#where, [rank.host, rank.pid ? `process ${rank.pid}` : null].filter(Boolean).join(", "));
    DIMENSIONS.forEach(([, , field], index) => {
      setOwned(this.#owned[index], rank[field], all[field]);
      const interval = rank[field];
      setText(this.#words[index], interval ? `${numbers.formatInterval(interval)} of ${all[field]}` : numbers.UNKNOWN);
    });
    setStep(this.#step, rank, all.stepSeconds);
    setText(this.#stepWords, describeStep(rank));
    this.#bandwidth.set([[0, shareOfMemory(rank) ?? 0]], describeBandwidth(rank));
    setText(this.#bandwidthWords, withShare(describeBandwidth(rank), shareOfMemory(rank)));
    setText(this.#memory[0], withShare(numbers.formatBytes(rank.weight_bytes), numbers.divide(rank.weight_bytes, all.weightBytes)));
    setText(this.#memory[1], numbers.formatBytes(rank.kv_cache_bytes));
    setText(this.#memory[2], numbers.formatBytes(rank.rss_bytes));
  }
}

const COLUMNS = ["Rank", "Host", "Owns", "Step", "Gathers", "Bandwidth", "Weights", "KV cache", "Memory", ...DIMENSIONS.map(([, short]) => short)];

class Row {
  #owned = DIMENSIONS.map(([words]) => makeBar(["owned"], words));
  #bandwidth = makeBar(["used"], "Bandwidth");
  #step = makeBar(["used", "gather"], "Step");
  #cells = Object.fromEntries(COLUMNS.map((name) => [name, element(name === "Rank" ? "th" : "td", name === "Rank" ? { scope: "row" } : {})]));
  #stepWords = element("span");
  #share = element("span");

  constructor() {
    const cells = this.#cells;
    cells.Owns.append(element("span", { class: "stack" }, ...this.#owned.map((bar) => bar.node)));
    cells.Step.append(this.#step.node, this.#stepWords);
    cells.Bandwidth.append(this.#bandwidth.node, this.#share);
    this.node = element("tr", {}, ...Object.values(cells));
  }

  show(rank, all) {
    const cells = this.#cells;
    setText(cells.Rank, String(rank.rank));
    setText(cells.Host, rank.host ?? numbers.UNKNOWN);
    cells.Host.title = rank.pid ? `process ${rank.pid}` : "";
    DIMENSIONS.forEach(([, short, field], index) => {
      setOwned(this.#owned[index], rank[field], all[field]);
      setText(cells[short], numbers.formatInterval(rank[field]));
    });
    setText(cells.Weights, numbers.formatBytes(rank.weight_bytes));
    setText(cells["KV cache"], numbers.formatBytes(rank.kv_cache_bytes));
    setText(cells.Memory, numbers.formatBytes(rank.rss_bytes));
    setStep(this.#step, rank, all.stepSeconds);
    setText(this.#stepWords, numbers.formatSeconds(rank.step_seconds));
    setText(cells.Gathers, numbers.formatSeconds(rank.gather_seconds));
    this.#bandwidth.set([[0, shareOfMemory(rank) ?? 0]], describeBandwidth(rank));
    setText(this.#share, withShare(numbers.formatBandwidth(rank.bytes_per_second), shareOfMemory(rank)));
  }
}

export class RankView {
  #place;
  #words;
  #parts = [];

  constructor(place, words) {
    this.#place = place;
    this.#words = words;
  }

  show(ranks) {
    if (ranks.length === 0 || ranks.length !== this.#parts.length) this.#build(ranks.length);
    const all = measureAll(ranks);
    ranks.forEach((rank, index) => this.#parts[index].show(rank, all));
    const hosts = new Set(ranks.map((rank) => rank.host)).size;
    this.#place.classList.toggle("one-host", hosts <= 1);
    const weights = all.weightBytes > 0 ? `${numbers.formatBytes(all.weightBytes)} of weights in all` : null;
    setText(this.#words, [weights, hosts > 1 ? `${hosts} hosts` : null].filter(Boolean).join(", "));
  }

  #build(count) {
    this.#parts = Array.from({ length: count }, () => (count <= MOST_CARDS ? new Card() : new Row()));
    const nodes = this.#parts.map((part) => part.node);
    if (count === 0) {
      this.#place.replaceChildren(element("p", { class: "hint" }, "No rank has reported yet."));
    } else if (count <= MOST_CARDS) {
      this.#place.replaceChildren(element("div", { class: "cards" }, ...nodes));
    } else {
      const head = element("tr", {}, ...COLUMNS.map((name) => element("th", { scope: "col" }, name)));
      const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...nodes));
      this.#place.replaceChildren(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the ranks" }, table));
    }
  }
}
