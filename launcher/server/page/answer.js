// One answer: its text, thoughts and tool calls as they come, what is said under it, and the fields for results of its calls.

import { element } from "./elements.js";
import { makeMarkdown } from "./markdown.js";
import { formatCount, formatRate, formatSeconds } from "./numbers.js";
import { ServerError } from "./stream.js";

// A call of a function that the model asks for, with a field for what it gave.
class ToolCall {
  id = null;
  name = "";
  arguments = "";
  #heading = element("h4", {}, "Tool call");
  #arguments = element("code");
  #result = element("textarea", { rows: "2", spellcheck: "false" });
  #field = element("label", { hidden: "" }, "Result", this.#result);
  node = element(
    "div",
    { class: "call" },
    this.#heading,
    element("pre", { tabindex: "0", role: "group", "aria-label": "Arguments" }, this.#arguments),
    this.#field,
  );

  take(piece) {
    this.id = piece.id ?? this.id;
    this.name += piece.function?.name ?? "";
    this.arguments += piece.function?.arguments ?? "";
    this.#heading.textContent = `Tool call: ${this.name}`;
    this.#arguments.textContent = this.arguments;
  }

  askForResult() {
    this.#field.hidden = false;
    this.#result.setAttribute("aria-label", `Result of ${this.name}`);
  }

  // Its fields stay readable, but are sent no more.
  close() {
    this.#result.disabled = true;
  }

  get request() {
    return { id: this.id, type: "function", function: { name: this.name, arguments: this.arguments } };
  }

  get answer() {
    return { role: "tool", tool_call_id: this.id, content: this.#result.value };
  }
}

export class Answer {
  text = "";
  #calls = [];
  #thought = "";
  #body = element("div", { class: "markdown" });
  #thoughts = element("p", { class: "text" });
  #thinking = element("details", { class: "thinking", hidden: "" }, element("summary", {}, "Reasoning"), this.#thoughts);
  #note = element("p", { class: "note" }, "waiting");
  #actions = element("div", { class: "actions", hidden: "" });
  #article = element(
    "article",
    { class: "message answer", "aria-busy": "true" },
    element("h3", {}, "Answer"),
    this.#thinking,
    this.#body,
    this.#note,
    this.#actions,
  );
  #began = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  #usage = null;
  #reason = null;
  #drawing = null;

  constructor(log) {
    log.append(this.#article);
  }

  take(event, onDrawn) {
    if (event.error) throw new ServerError(event.error.message);
    if (event.usage) this.#usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) this.#reason = choice.finish_reason;
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
    if (!content && !thought && !calls?.length) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
    this.text += content ?? "";
    this.#thought += thought ?? "";
    for (const piece of calls ?? []) this.#takeCall(piece);
    // Markdown is made anew at most once a frame, however fast the tokens are.
    this.#drawing ??= requestAnimationFrame(() => {
      this.#draw();
      onDrawn();
    });
  }

  #takeCall(piece) {
    const index = piece.index ?? this.#calls.length;
    if (this.#calls[index] === undefined) {
      this.#calls[index] = new ToolCall();
      this.#note.before(this.#calls[index].node);
    }
    this.#calls[index].take(piece);
  }

  #draw() {
    this.#drawing = null;
    this.#body.replaceChildren(...makeMarkdown(this.text));
    this.#thinking.hidden = this.#thought === "";
    this.#thoughts.textContent = this.#thought;
    this.#note.textContent = this.#describe();
  }

  // `words` say why it ended early; null where it did not.
  end(words, failed = false) {
    cancelAnimationFrame(this.#drawing);
    if (this.#first !== null) this.#draw();
    if (failed) this.#note.before(element("p", { class: "error" }, words));
    const figures = this.#first === null ? [] : [this.#describe()];
    if (words !== null && !failed) figures.push(words);
    if (this.#reason === "length") figures.push("ended at max tokens");
    if (words === null && this.#first === null) figures.push("The answer is empty.");
    this.#note.textContent = figures.join(" · ");
    this.#note.hidden = figures.length === 0;
    this.#article.setAttribute("aria-busy", "false");
    if (words !== null) this.#calls = [];
  }

  get isEmpty() {
    return this.text === "" && this.#calls.length === 0;
  }

  // What the conversation keeps of it. Calls without results are left out: no template takes them.
  makeMessages({ withResults }) {
    if (!withResults || this.#calls.length === 0) return this.text === "" ? [] : [{ role: "assistant", content: this.text }];
    const said = { role: "assistant", content: this.text, tool_calls: this.#calls.map((call) => call.request) };
    return [said, ...this.#calls.map((call) => call.answer)];
  }

  // What can be done with the last answer.
  offer({ regenerate, sendResults }) {
    const button = (words, act) => {
      const node = element("button", { type: "button", class: "quiet" }, words);
      node.addEventListener("click", act);
      return node;
    };
    const buttons = [button("Regenerate", regenerate)];
    if (this.#calls.length > 0) buttons.unshift(button("Send results", sendResults));
    for (const call of this.#calls) call.askForResult();
    this.#actions.replaceChildren(...buttons);
    this.#actions.hidden = false;
  }

  close() {
    this.#actions.hidden = true;
    for (const call of this.#calls) call.close();
  }

  remove() {
    this.#article.remove();
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
