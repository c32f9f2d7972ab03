// The settings beside the chat, as fields of a request.

import { byId } from "./elements.js";

const NUMBERS = {
  temperature: "temperature",
  "top-p": "top_p",
  "top-k": "top_k",
  "min-p": "min_p",
  "repetition-penalty": "repetition_penalty",
  "max-tokens": "max_tokens",
  seed: "seed",
};

// The tools' JSON as the API takes it: a list of tools. Throws the sentence that the field then shows.
function readTools(text) {
  if (text.trim() === "") return {};
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is no JSON: ${error.message}`);
  }
  if (!Array.isArray(tools) || tools.some((tool) => typeof tool?.function?.name !== "string")) {
    throw new Error('Give a list such as [{"type": "function", "function": {"name": "NAME", "parameters": {}}}].');
  }
  return { tools };
}

export class Settings {
  #box = byId("settings");
  #tools = byId("tools");

  constructor() {
    this.#tools.addEventListener("input", () => this.#tools.setCustomValidity(""));
    if (matchMedia("(max-width: 999px)").matches) this.#box.open = false;
  }

  // The request's fields; null where a field cannot be sent, which the browser then says beside it.
  read() {
    let tools = {};
    try {
      tools = readTools(this.#tools.value);
    } catch (error) {
      this.#tools.setCustomValidity(error.message);
    }
    const fields = {};
    for (const id of [...Object.keys(NUMBERS), "tools"]) {
      const input = byId(id);
      if (!input.checkValidity()) {
        this.#box.open = true;
        input.reportValidity();
        return null;
      }
      if (id in NUMBERS && input.value !== "") fields[NUMBERS[id]] = Number(input.value);
    }
    const stops = byId("stop-texts").value.split("\n").filter((text) => text !== "");
    if (stops.length > 0) fields.stop = stops;
    return { ...fields, ...tools };
  }

  get systemMessages() {
    const text = byId("system").value;
    return text.trim() === "" ? [] : [{ role: "system", content: text }];
  }

  // The system prompt that the model's chat template adds where none is given.
  showSystemPrompt(text) {
    byId("system").placeholder = text ?? "none";
  }
}
