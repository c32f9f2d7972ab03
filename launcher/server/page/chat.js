// The chat: what was said, and one streamed answer at a time. Knows nothing of ranks.

import { Answer } from "./answer.js";
import { byId, element } from "./elements.js";
import { Settings } from "./settings.js";
import { readEvents, readRefusal, ServerError } from "./stream.js";

class Chat {
  #makeHeaders;
  #askForKey;
  #settings = new Settings();
  #said = [];
  #last = null; // The last answer, while it is not yet part of what was said.
  #request = null;
  #log = byId("log");
  #prompt = byId("prompt");

  constructor({ makeHeaders, askForKey }) {
    this.#makeHeaders = makeHeaders;
    this.#askForKey = askForKey;
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#send();
      }
    });
    byId("chat-form").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#request?.abort();
    });
    byId("stop").addEventListener("click", () => this.#request?.abort());
    byId("clear").addEventListener("click", () => this.#clear());
  }

  showSystemPrompt(text) {
    this.#settings.showSystemPrompt(text);
  }

  #clear() {
    this.#request?.abort();
    this.#request = null;
    this.#said = [];
    this.#last = null;
    this.#log.replaceChildren();
    this.#showBusy(false);
    this.#prompt.focus();
  }

  #showBusy(busy) {
    const focused = document.activeElement;
    byId("stop").hidden = !busy;
    byId("send").hidden = busy;
    if (focused === byId("stop") || focused === byId("send")) byId(busy ? "stop" : "send").focus();
  }

  async #send() {
    const words = this.#prompt.value;
    if (this.#request !== null || words.trim() === "") return;
    const fields = this.#settings.read();
    if (fields === null) return;
    this.#keepLast({ withResults: false });
    const question = { role: "user", content: words };
    this.#prompt.value = "";
    this.#log.append(element("article", { class: "message" }, element("h3", {}, "You"), element("p", { class: "text" }, words)));
    this.#said.push(question);
    const answer = await this.#ask(fields);
    if (answer === null || !answer.isEmpty) return;
    // Nothing came: the words stand in the field again, to be sent anew.
    this.#keepLast({ withResults: false });
    if (this.#prompt.value === "") this.#prompt.value = words;
  }

  #sendResults() {
    const fields = this.#request === null ? this.#settings.read() : null;
    if (fields === null) return;
    this.#keepLast({ withResults: true });
    this.#prompt.focus();
    this.#ask(fields);
  }

  #regenerate() {
    const fields = this.#request === null ? this.#settings.read() : null;
    if (fields === null) return;
    this.#last.remove();
    this.#prompt.focus();
    this.#ask(fields);
  }

  #keepLast({ withResults }) {
    this.#last?.close();
    this.#said.push(...(this.#last?.makeMessages({ withResults }) ?? []));
    this.#last = null;
    // A question that got no answer is left out: many templates want turns.
    if (this.#said.at(-1)?.role === "user") this.#said.pop();
  }

  // Asks for an answer to what was said; returns it, or null where the conversation was cleared meanwhile.
  async #ask(fields) {
    const messages = [...this.#settings.systemMessages, ...this.#said];
    const request = new AbortController();
    this.#request = request;
    this.#showBusy(true);
    const answer = new Answer(this.#log);
    this.#last = answer;
    this.#follow(true);
    let below = true;
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...this.#makeHeaders() },
        body: JSON.stringify({ ...fields, messages, stream: true, stream_options: { include_usage: true } }),
        signal: request.signal,
      });
      if (!response.ok) throw await readRefusal(response);
      for await (const event of readEvents(response)) {
        below = this.#isAtEnd();
        answer.take(event, () => this.#follow(below));
      }
      answer.end(null);
    } catch (error) {
      if (request.signal.aborted) answer.end("stopped");
      else answer.end(error instanceof ServerError ? error.message : "The connection to the server was lost.", true);
      if (error.status === 401) this.#askForKey();
    } finally {
      request.abort(); // What is still open of a stream that ended with an error.
    }
    if (this.#request !== request) return null; // Cleared.
    this.#request = null;
    this.#showBusy(false);
    answer.offer({ regenerate: () => this.#regenerate(), sendResults: () => this.#sendResults() });
    this.#follow(below);
    return answer;
  }

  #isAtEnd() {
    return this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 40;
  }

  // Who has scrolled up to read is left there.
  #follow(below) {
    if (below) this.#log.scrollTop = this.#log.scrollHeight;
  }
}

export const startChat = (page) => new Chat(page);
