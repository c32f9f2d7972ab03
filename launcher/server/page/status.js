// What /status says of the whole server: its state, totals, what is wrong, and two minutes of history. Ranks are drawn by ranks.js.

import { Chart } from "./charts.js";
import { byId, element, makeBar, setText } from "./elements.js";
import * as numbers from "./numbers.js";
import { RankView } from "./ranks.js";

const HISTORY_SECONDS = 120;
// Beyond so many ranks a chart shows the lowest, the median and the highest of them.
const MANY_LINES = 4;

// The name of a total, its value, what stands below it, and the share that its bar shows.
const TOTALS = [
  ["Tokens/s", (s) => numbers.formatRate(s.tokens_per_second), () => "last 5 s"],
  ["Prompt tokens/s", (s) => numbers.formatRate(s.prompt_tokens_per_second), () => "last 5 s"],
  ["Time to first token", (s) => numbers.formatSeconds(s.time_to_first_token_seconds), () => "last 5 s"],
  ["Answered", (s) => numbers.formatCount(s.requests_total), (s) => describe("requests, # tokens", s.tokens_total)],
  [
    "Running",
    (s) => numbers.formatCount(s.running),
    (s) => describe("of #", s.max_running),
    (s) => numbers.divide(s.running, s.max_running),
  ],
  [
    "Waiting",
    (s) => numbers.formatCount(s.waiting),
    (s) => describe("of #", s.max_waiting),
    (s) => numbers.divide(s.waiting, s.max_waiting),
  ],
  [
    "KV blocks",
    (s) => numbers.formatCount(s.blocks_used),
    (s) => describe("of #, each # tokens", s.blocks_total, s.block_size),
    (s) => numbers.divide(s.blocks_used, s.blocks_total),
  ],
  ["Restarts", (s) => numbers.formatCount(s.restarts), () => "since the start"],
];

// The words with a count for every #; nothing where one is not known.
function describe(words, ...counts) {
  if (counts.some((count) => count === null || count === undefined)) return "";
  return words.replace(/#/g, () => numbers.formatCount(counts.shift()));
}

const STATES = {
  loading: "The ranks load their weights.",
  recovering: "A rank failed. All ranks start again, and answers go on where they were.",
  draining: "The server is stopping. It takes no new requests.",
};

function describeServer(status) {
  const count = (number, word) => (number ? `${number} ${word}${number === 1 ? "" : "s"}` : null);
  return [
    [count(status.world_size, "rank"), count(status.threads_per_rank, "thread")].filter(Boolean).join(" × "),
    count(status.num_layers, "layer"),
    status.quantization,
    status.dtype,
    status.kernel ? `kernel ${status.kernel}` : null,
    status.collectives ? `gathers by ${status.collectives}` : null,
    status.context_tokens ? `context ${numbers.formatCount(status.context_tokens)} tokens` : null,
    status.uptime_seconds ? `up ${numbers.formatDuration(status.uptime_seconds)}` : null,
    status.version ? `version ${status.version}` : null,
  ].filter(Boolean);
}

function summarize(values) {
  if (values.length <= MANY_LINES) return values;
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  return known.length === 0 ? [null, null, null] : [known[0], known[Math.floor(known.length / 2)], known.at(-1)];
}

export class StatusView {
  #totals = [];
  #samples = [];
  #charts;
  #ranks = new RankView(byId("ranks"), byId("rank-words"));
  #answered = null;

  constructor() {
    for (const [name, value, below, share] of TOTALS) {
      const number = element("span", { class: "value" }, numbers.UNKNOWN);
      const words = element("span", { class: "hint" });
      const bar = share ? makeBar(["used"], name) : null;
      byId("totals").append(element("div", {}, element("dt", {}, name), element("dd", {}, number, " ", words, ...(bar ? [bar.node] : []))));
      this.#totals.push({ value, below, share, number, words, bar });
    }
    const named = (...names) => (_, index) => names[index];
    const ofRanks = (...names) => (sample, index) => (sample.numRanks <= MANY_LINES ? `rank ${index}` : names[index]);
    const { formatCount, formatRate, formatSeconds, formatShare } = numbers;
    this.#charts = [
      new Chart({ title: "Tokens/s", format: formatRate, values: (s) => [s.decoded, s.prompts], name: named("decoded", "prompts") }),
      new Chart({ title: "Queue", format: formatCount, values: (s) => [s.running, s.waiting], name: named("running", "waiting"), whole: true }),
      new Chart({ title: "Step time", format: formatSeconds, values: (s) => s.steps, name: ofRanks("fastest", "median", "slowest") }),
      new Chart({
        title: "Bandwidth, share of what memory gives",
        format: formatShare,
        values: (s) => s.shares,
        name: ofRanks("lowest", "median", "highest"),
        top: 1,
      }),
    ];
    byId("charts").append(...this.#charts.map((chart) => chart.node));
  }

  show(status) {
    this.#answered = Date.now();
    byId("view").classList.remove("stale");
    setText(byId("model"), status.model ?? "");
    document.title = status.model ? `${status.model} · tandem` : "tandem";
    this.#showState(status.state ?? "unknown");
    byId("facts").replaceChildren(...describeServer(status).map((words) => element("span", {}, words)));
    this.#showNotice(status);
    for (const total of this.#totals) {
      setText(total.number, total.value(status));
      setText(total.words, total.below(status));
      const share = total.share?.(status) ?? 0;
      total.bar?.set([[0, share]], numbers.formatShare(share));
    }
    const ranks = status.ranks ?? [];
    this.#ranks.show(ranks);
    this.#remember({
      decoded: status.tokens_per_second,
      prompts: status.prompt_tokens_per_second,
      running: status.running,
      waiting: status.waiting,
      numRanks: ranks.length,
      steps: summarize(ranks.map((rank) => rank.step_seconds ?? null)),
      shares: summarize(ranks.map((rank) => numbers.divide(rank.bytes_per_second, rank.memory_bytes_per_second))),
    });
  }

  showSilence(sentence) {
    const since = this.#answered === null ? "" : ` Last seen ${numbers.formatDuration((Date.now() - this.#answered) / 1000)} ago.`;
    this.#showStale("no answer", [element("p", {}, `${sentence}${since} Asking again every second.`)]);
    this.#remember(null);
  }

  showNoKey() {
    this.#showStale("key needed", []);
  }

  #showStale(state, notices) {
    byId("view").classList.add("stale");
    this.#showState(state);
    this.#setNotices(notices);
  }

  #showState(state) {
    setText(byId("state"), state);
    byId("state").dataset.state = state;
  }

  #showNotice(status) {
    const notices = [];
    const words = STATES[status.state];
    if (words) {
      const { done_bytes: done, total_bytes: total } = status.loading ?? {};
      const share = numbers.divide(done, total);
      const far = share === null ? "" : ` ${numbers.formatBytes(done)} of ${numbers.formatBytes(total)}.`;
      notices.push(element("p", {}, `${words}${far}`));
      if (share !== null) notices.push(element("progress", { max: 1, value: share, "aria-label": "Loading" }));
    }
    if (status.last_failure) notices.push(element("p", {}, `Last failure: ${status.last_failure}`));
    this.#setNotices(notices);
  }

  #setNotices(notices) {
    const place = byId("notice");
    const same = notices.length === place.children.length && notices.every((node, index) => node.isEqualNode(place.children[index]));
    if (!same) place.replaceChildren(...notices);
    place.hidden = notices.length === 0;
  }

  #remember(values) {
    const now = Date.now() / 1000;
    this.#samples = this.#samples.filter((sample) => sample.time > now - HISTORY_SECONDS);
    this.#samples.push({ time: now, values });
    for (const chart of this.#charts) chart.show(this.#samples, now, HISTORY_SECONDS);
  }
}
