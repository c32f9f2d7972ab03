// The chat: what was said, one streamed answer at a time, and how fast it came. Knows nothing of ranks.

import { byId, element } from "./elements.js";
import { formatCount, formatRate, formatSeconds } from "./numbers.js";

// What the server says in place of an answer, in its own sentence.
class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function readRefusal(response) {
  const body = await response.json().catch(() => null);
  const sentence = body?.error?.message ?? `The server answered with ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  return new ServerError(wait > 0 ? `${sentence} Try again in ${wait} s.` : sentence, response.status);
}

// The JSON of every event of a response, as it comes; ends at [DONE]. Throws where the stream ends before that.
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer did.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// One answer: its element, filled as the text comes, and what is said under it.
class Answer {
  text = "";
  #node = element("p", { class: "text" });
  #note = element("p", { class: "note" }, "waiting");
  #article = element("article", { class: "message answer", "aria-busy": "true" }, element("h3", {}, "Answer"), this.#node, this.#note);
  #began = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  #usage = null;
  #reason = null;

  constructor(log) {
    this.#node.append(document.createTextNode(""));
    log.append(this.#article);
  }

  take(event) {
    if (event.error) throw new ServerError(event.error.message);
    if (event.usage) this.#usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) this.#reason = choice.finish_reason;
    const piece = choice.delta?.content;
    if (!piece) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
    this.text += piece;
    this.#node.lastChild.appendData(piece);
    this.#note.textContent = this.#describe();
  }

  // `words` say why it ended early; null where it did not.
  end(words, failed = false) {
    if (failed) this.#article.append(element("p", { class: "error" }, words));
    const figures = this.#first === null ? [] : [this.#describe()];
    if (words !== null && !failed) figures.push(words);
    if (this.#reason === "length") figures.push("ended at max tokens");
    if (words === null && this.#first === null) figures.push("The answer is empty.");
    this.#note.textContent = figures.join(" · ");
    this.#note.hidden = figures.length === 0;
    this.#article.setAttribute("aria-busy", "false");
  }

  #describe() {
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const words = [`${formatCount(tokens)} ${tokens === 1 ? "token" : "tokens"}`];
    // The first token is the prompt's; the others are decoding.
    const seconds = (this.#last - this.#first) / 1000;
    if (tokens > 1 && seconds > 0) words.push(`${formatRate((tokens - 1) / seconds)} tokens/s`);
    words.push(`first token after ${formatSeconds((this.#first - this.#began) / 1000)}`);
    if (this.#usage) words.push(`prompt ${formatCount(this.#usage.prompt_tokens)} tokens`);
    return words.join(" · ");
  }
}

class Chat {
  #makeHeaders;
  #askForKey;
  #said = [];
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
    if (matchMedia("(max-width: 999px)").matches) byId("settings").open = false;
  }

  #clear() {
    this.#request?.abort();
    this.#request = null;
    this.#said = [];
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

  // The request's fields; null where a field cannot be sent, which the browser then says beside it.
  #readFields() {
    const fields = {};
    for (const [id, name] of Object.entries({ temperature: "temperature", "max-tokens": "max_tokens", seed: "seed" })) {
      const input = byId(id);
      if (!input.checkValidity()) {
        byId("settings").open = true;
        input.reportValidity();
        return null;
      }
      if (input.value !== "") fields[name] = Number(input.value);
    }
    return fields;
  }

  async #send() {
    const words = this.#prompt.value;
    if (this.#request !== null || words.trim() === "") return;
    const fields = this.#readFields();
    if (fields === null) return;
    const question = { role: "user", content: words };
    const system = byId("system").value;
    const messages = [...(system.trim() === "" ? [] : [{ role: "system", content: system }]), ...this.#said, question];
    const request = new AbortController();
    this.#request = request;
    this.#showBusy(true);
    this.#prompt.value = "";
    this.#log.append(element("article", { class: "message" }, element("h3", {}, "You"), element("p", { class: "text" }, words)));
    const answer = new Answer(this.#log);
    this.#follow(true);
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...this.#makeHeaders() },
        body: JSON.stringify({ ...fields, messages, stream: true, stream_options: { include_usage: true } }),
        signal: request.signal,
      });
      if (!response.ok) throw await readRefusal(response);
      for await (const event of readEvents(response)) {
        const below = this.#isAtEnd();
        answer.take(event);
        this.#follow(below);
      }
      answer.end(null);
    } catch (error) {
      const below = this.#isAtEnd();
      if (request.signal.aborted) answer.end("stopped");
      else answer.end(error instanceof ServerError ? error.message : "The connection to the server was lost.", true);
      this.#follow(below);
      if (error.status === 401) this.#askForKey();
    } finally {
      request.abort(); // What is still open of a stream that ended with an error.
    }
    if (this.#request !== request) return; // Cleared.
    this.#request = null;
    this.#showBusy(false);
    if (answer.text !== "") this.#said.push(question, { role: "assistant", content: answer.text });
    else if (this.#prompt.value === "") this.#prompt.value = words; // To be sent again.
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
