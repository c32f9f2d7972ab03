// Elements for text in Markdown. marked splits it; text goes in as text only, so HTML in an answer stays text and images become links.

import { element } from "./elements.js";
import { lexer } from "./marked.js";

const LINK = /^(https?:|mailto:)/i;

function makeLink(address, children) {
  if (!LINK.test(address)) return element("span", {}, ...children);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function makeList(token) {
  const items = token.items.map((item) => {
    const box = item.task ? [item.checked ? "\u2611 " : "\u2610 "] : [];
    return element("li", {}, ...box, ...makeAll(item.tokens.filter((part) => part.type !== "checkbox")));
  });
  const start = token.ordered && token.start !== 1 ? { start: token.start } : {};
  return element(token.ordered ? "ol" : "ul", start, ...items);
}

function makeTable(token) {
  const row = (cells, name, scope) => element("tr", {}, ...cells.map((cell) => element(name, scope, ...makeAll(cell.tokens))));
  const head = element("thead", {}, row(token.header, "th", { scope: "col" }));
  const body = element("tbody", {}, ...token.rows.map((cells) => row(cells, "td", {})));
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, element("table", {}, head, body));
}

function makeCode(token) {
  const label = token.lang ? `Code, ${token.lang}` : "Code";
  return element("pre", { tabindex: "0", role: "group", "aria-label": label }, element("code", {}, token.text));
}

const MAKERS = {
  space: () => "",
  def: () => "",
  br: () => element("br"),
  hr: () => element("hr"),
  code: makeCode,
  table: makeTable,
  list: makeList,
  // An answer's headings are below the page's own, of which the last is h3.
  heading: (token) => element(`h${Math.min(6, token.depth + 3)}`, {}, ...makeAll(token.tokens)),
  blockquote: (token) => element("blockquote", {}, ...makeAll(token.tokens)),
  paragraph: (token) => element("p", {}, ...makeAll(token.tokens)),
  strong: (token) => element("strong", {}, ...makeAll(token.tokens)),
  em: (token) => element("em", {}, ...makeAll(token.tokens)),
  del: (token) => element("del", {}, ...makeAll(token.tokens)),
  codespan: (token) => element("code", {}, token.text),
  link: (token) => makeLink(token.href, makeAll(token.tokens)),
  image: (token) => makeLink(token.href, [token.text || token.href]),
  html: (token) => (token.block ? element("p", {}, token.raw.trim()) : token.raw),
  escape: (token) => token.text,
};

const makeOne = (token) => MAKERS[token.type]?.(token) ?? (token.tokens ? element("span", {}, ...makeAll(token.tokens)) : token.raw);

const makeAll = (tokens) => tokens.map(makeOne);

// The blocks of a text. One that marked cannot split is shown as it is.
export function makeMarkdown(text) {
  try {
    return makeAll(lexer(text));
  } catch {
    return [element("p", { class: "text" }, text)];
  }
}
