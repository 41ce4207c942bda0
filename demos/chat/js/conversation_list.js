// The list of conversations: open, rename in place, delete.

import { el } from "./dom.js";

export class ConversationList {
  /** `actions`: {open(id), renamed({id, title} or null), remove(id, title)}. */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
  }

  /** Show these [{id, title}], with the one open now marked. */
  show(conversations, openId) {
    if (this.root.querySelector(".rename")) return; // shown anew when the title is given
    this.root.replaceChildren(...conversations.map((one) => this.#item(one, one.id === openId)));
    this.root.hidden = conversations.length === 0;
  }

  /** Mark the open one. */
  mark(openId) {
    for (const item of this.root.children) {
      if (item.dataset.id === openId) item.querySelector(".open")?.setAttribute("aria-current", "true");
      else item.querySelector(".open")?.removeAttribute("aria-current");
    }
  }

  #item({ id, title }, open) {
    const item = el("li", { dataset: { testid: "conversation", id } });
    const name = el(
      "button",
      { type: "button", class: "open", title, "aria-current": open ? "true" : null },
      title,
    );
    const rename = el(
      "button",
      {
        type: "button",
        class: "quiet",
        "aria-label": `Rename ${title}`,
        title: "Rename",
        dataset: { testid: "rename-conversation" },
      },
      "✎",
    );
    const remove = el(
      "button",
      {
        type: "button",
        class: "quiet",
        "aria-label": `Delete ${title}`,
        title: "Delete",
        dataset: { testid: "delete-conversation" },
      },
      "✕",
    );
    name.addEventListener("click", () => this.actions.open(id));
    name.addEventListener("dblclick", () => this.#edit(item, id, title));
    rename.addEventListener("click", () => this.#edit(item, id, title));
    remove.addEventListener("click", () => this.actions.remove(id, title));
    item.append(name, rename, remove);
    return item;
  }

  #edit(item, id, title) {
    const field = el("input", { class: "rename", value: title, maxLength: 200, "aria-label": "New title" });
    let over = false;
    const end = (keep) => {
      if (over) return;
      over = true;
      const wanted = field.value.trim();
      const renamed = keep && wanted !== "" && wanted !== title;
      item.replaceWith(this.#item({ id, title: renamed ? wanted : title }, false));
      this.actions.renamed(renamed ? { id, title: wanted } : null);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(true);
      if (event.key !== "Escape") return;
      event.stopPropagation();
      end(false);
    });
    field.addEventListener("blur", () => end(true));
    item.replaceChildren(field);
    field.focus();
    field.select();
  }
}
