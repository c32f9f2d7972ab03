// Makes elements. Text goes in as text only; styles are set on the object, since the page's policy allows no style attributes.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const element = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);

export const drawn = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

// Sets the text where it is another one, so that what is marked with the mouse stays marked.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A bar whose filled parts are set as shares of its length: set([[first, end], ...]).
export function makeBar(kinds, label) {
  const parts = kinds.map((kind) => element("span", { class: kind }));
  const node = element("span", { class: "bar", role: "img", "aria-label": label }, ...parts);
  const set = (shares, words) => {
    parts.forEach((part, index) => {
      const [first, end] = shares[index] ?? [0, 0];
      const inside = (share) => 100 * Math.min(1, Math.max(0, share));
      part.style.left = `${inside(first)}%`;
      part.style.width = `${inside(end) - inside(first)}%`;
    });
    node.setAttribute("aria-label", `${label}: ${words}`);
    node.title = `${label}: ${words}`;
  };
  return { node, set };
}
