// An answer's Markdown as sanitised HTML, block by block: while it streams, only the last blocks change.

import { Marked } from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";
import { el } from "./dom.js";

const ALLOWED_TAGS = [
  "p",
  "br",
  "hr",
  "strong",
  "em",
  "del",
  "code",
  "pre",
  "blockquote",
  "ul",
  "ol",
  "li",
  "a",
  "h3",
  "h4",
  "h5",
  "h6",
  "table",
  "thead",
  "tbody",
  "tr",
  "th",
  "td",
];
const ALLOWED_ATTR = ["href", "title", "start", "align", "class"];

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // HTML that a model writes is something it talks about, not part of this page.
    html: ({ text }) => (/^<br\s*\/?>$/i.test(text.trim()) ? "<br>" : escaped(text)),
    // Nothing is loaded for an answer's sake.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || "image")}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    // The page has its own h1 and h2.
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

function escaped(text) {
  const signs = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (sign) => signs[sign]);
}

/** Shows growing Markdown in `root`. */
export class MarkdownView {
  #shown = [];

  constructor(root) {
    this.root = root;
  }

  /** Show all of `text`; blocks that are as before stay as they are, selection included. */
  update(text) {
    const blocks = marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
    const same = this.#shown.findIndex((raw, index) => raw !== blocks[index]?.raw);
    const first = same === -1 ? this.#shown.length : same;
    while (this.root.childElementCount > first) this.root.lastElementChild.remove();
    for (const block of blocks.slice(first)) this.root.append(rendered(block));
    this.#shown = blocks.map((block) => block.raw);
  }
}

function rendered(block) {
  const fragment = DOMPurify.sanitize(marked.parser([block]), {
    ALLOWED_TAGS,
    ALLOWED_ATTR,
    ADD_URI_SAFE_ATTR: ["align", "start"], // their values are no addresses
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre));
  for (const table of fragment.querySelectorAll("table")) {
    const box = el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  return el("div", { class: "block", dir: "auto" }, fragment);
}

function codeBlock(pre) {
  const code = pre.querySelector("code") ?? pre;
  const language = /(?:^| )language-(\S+)/.exec(code.className)?.[1] ?? "";
  const copy = el("button", { type: "button", class: "quiet copy", "aria-label": "Copy the code" }, "Copy");
  copy.addEventListener("click", () => copyText(code.textContent, copy));
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const shell = el(
    "div",
    { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, language), copy),
  );
  shell.append(pre.cloneNode(true));
  return shell;
}

/** Put `text` into the clipboard, and say on `button` for a moment that it is there. */
export async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}
