// The page's start: colours, the API key, and /status once a second for the view of the ranks. Knows not what an answer looks like.

import { startChat } from "./chat.js";
import { byId } from "./elements.js";
import { StatusView } from "./status.js";

const PERIOD_MILLISECONDS = 1000;
const PATIENCE_MILLISECONDS = 5000;
const KEY = "tandem-api-key";
const THEME = "tandem-colours";

// --- colours

function startTheme() {
  const choice = byId("theme");
  const apply = () => {
    document.documentElement.dataset.theme = choice.value;
  };
  choice.value = localStorage.getItem(THEME) ?? "";
  if (choice.selectedIndex < 0) choice.value = "";
  choice.addEventListener("change", () => {
    localStorage.setItem(THEME, choice.value);
    apply();
  });
  apply();
}

// --- the key: kept until the tab is closed, shown never

const readKey = () => sessionStorage.getItem(KEY);

function makeHeaders() {
  const key = readKey();
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

function askForKey() {
  const form = byId("key-form");
  byId("key-words").textContent = readKey() === null ? "The server asks for an API key." : "The server refused this key.";
  if (form.hidden) {
    form.hidden = false;
    byId("key").focus();
  }
  byId("forget-key").hidden = true;
}

function startKey(poll) {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key").value);
    byId("key").value = "";
    byId("key-form").hidden = true;
    byId("forget-key").hidden = false;
    byId("prompt").focus();
    poll();
  });
  byId("forget-key").addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    byId("forget-key").hidden = true;
    poll();
  });
  byId("forget-key").hidden = readKey() === null;
}

// --- /status

class Poll {
  #view;
  #onStatus;
  #timer = null;
  #turn = 0;
  #request = null;

  constructor(view, onStatus) {
    this.#view = view;
    this.#onStatus = onStatus;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  // Ask now, and then once a second; a call while it runs begins anew.
  start() {
    this.stop();
    if (!document.hidden) this.#ask(this.#turn);
  }

  stop() {
    clearTimeout(this.#timer);
    this.#turn += 1;
    this.#request?.abort();
  }

  async #ask(turn) {
    const began = performance.now();
    const request = new AbortController();
    this.#request = request;
    const patience = setTimeout(() => request.abort(), PATIENCE_MILLISECONDS);
    let next = true;
    try {
      const response = await fetch("status", { headers: makeHeaders(), cache: "no-store", signal: request.signal });
      const answer = await response.json().catch(() => null);
      if (turn !== this.#turn) return;
      if (response.status === 401) {
        // Asked again when a key is given.
        next = false;
        this.#view.showNoKey();
        askForKey();
      } else if (response.ok && answer !== null) {
        this.#view.show(answer);
        this.#onStatus(answer);
      } else {
        this.#view.showSilence(answer?.error?.message ?? `The server answers /status with ${response.status}.`);
      }
    } catch {
      if (turn === this.#turn) this.#view.showSilence("The server does not answer.");
    } finally {
      clearTimeout(patience);
      if (next && turn === this.#turn) {
        this.#timer = setTimeout(() => this.#ask(turn), Math.max(0, PERIOD_MILLISECONDS - (performance.now() - began)));
      }
    }
  }
}

startTheme();
const chat = startChat({ makeHeaders, askForKey });
const poll = new Poll(new StatusView(), (status) => chat.showSystemPrompt(status.system_prompt));
startKey(() => poll.start());
poll.start();
