// Elements made in one line. Text goes in as text, never as HTML.

/**
 * An element. `props`: `class`, `dataset` (object), `on` (event name to listener), DOM properties that exist
 * on the element, else attributes (null and false leave an attribute out). `children`: nodes or strings.
 */
export function el(tag, props = {}, ...children) {
  return dressed(document.createElement(tag), props, children);
}

/** The same for SVG, where everything is an attribute. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function dressed(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else if (name === "on")
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name.includes("-") || !(name in node)) {
      if (value !== null && value !== false) node.setAttribute(name, value);
    } else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** The element with this id; there must be one. */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`no element #${id}`);
  return node;
}

/** A term and its value of a `dl`; `kind`: its class. */
export function figure(term, value, kind = "") {
  return el("div", { class: kind }, el("dt", {}, term), el("dd", {}, value));
}
