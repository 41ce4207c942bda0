// Puts the parts of the page together.

import { Api } from "./api.js";
import { Banner, cloudTrouble } from "./banner.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { Controls } from "./controls.js";
import { ConversationList } from "./conversation_list.js";
import { Conversations } from "./conversations.js";
import { openDecision } from "./decision.js";
import { showDevice } from "./device.js";
import { askKey, confirmed } from "./dialogs.js";
import { byId, el } from "./dom.js";
import { bindDrawer } from "./drawer.js";
import { fillEmptyState } from "./empty_state.js";
import { LayerMap } from "./layer_map.js";
import { cloudOf, LinkChart } from "./link_chart.js";
import { MessageLog } from "./messages.js";
import { StatsFeed } from "./stats_feed.js";
import { bindTheme } from "./theme.js";

let numLayers = 0;
let numTokensOfOthers = 0;
let feedFailed = false;

const api = new Api((again) => askKey(byId("key-dialog"), again));
const banner = new Banner(byId("banner"));
const map = new LayerMap(byId("layer-map"), {
  edge: byId("legend-edge"),
  wire: byId("legend-wire"),
  cloud: byId("legend-cloud"),
});
const chart = new LinkChart(byId("link-chart"));
const controls = new Controls(byId("controls"), preview);
const conversations = new Conversations(api, (error) => {
  if (error) banner.show("save", `Conversations cannot be saved: ${error.message}`, "bad");
  else banner.clear("save");
});
const log = new MessageLog(byId("messages"), byId("log"), {
  retry: () => chat.retry(),
  openDecision: (isthmus) => openDecision(byId("decision"), isthmus, numLayers),
  numLayers: () => numLayers,
});
const chat = new Chat(
  {
    api,
    conversations,
    log,
    map,
    banner,
    ask: () => controls.ask(),
    model: () => byId("model").value || undefined,
  },
  { busy: setBusy, opened, listChanged },
);
const composer = new Composer(
  { form: byId("composer-form"), field: byId("composer"), send: byId("send"), stop: byId("stop") },
  { send, stop: () => chat.stop(), busy: () => chat.busy },
);
const list = new ConversationList(byId("conversations"), { open, renamed, remove });
const feed = new StatsFeed(api, onSnapshot, onFeedState);
const leftDrawer = bindDrawer(
  byId("conversations-panel"),
  byId("open-conversations"),
  [...byId("middle").children],
  "(max-width: 759px)",
);
bindDrawer(
  byId("settings-panel"),
  byId("open-settings"),
  [...byId("middle").children],
  "(max-width: 1119px)",
);

// ---- the conversation ---------------------------------------------------------------------------------

async function send(text) {
  await guarded(
    () => chat.send(text),
    () => composer.restore(text),
  );
}

function setBusy(busy) {
  composer.setBusy(busy);
  byId("messages").setAttribute("aria-busy", String(busy));
}

function opened(conversation) {
  const id = conversation?.id ?? "";
  if (location.hash.slice(1) !== id) history.replaceState(null, "", id ? `#${id}` : location.pathname);
  byId("empty").hidden = Boolean(conversation);
  byId("messages").hidden = !conversation;
  list.mark(id);
}

async function listChanged() {
  await guarded(async () => {
    const known = await conversations.list();
    list.show(known, chat.conversation?.id ?? "");
    byId("delete-all").hidden = known.length < 2;
    const note = byId("conversations-note");
    note.hidden = conversations.enabled && known.length > 0;
    note.textContent = conversations.enabled
      ? "Nothing here yet. Conversations are kept on this device."
      : "This agent keeps no conversations: they are gone when this page is closed.";
  });
}

async function open(id) {
  leftDrawer.close();
  if (id === chat.conversation?.id) return;
  await guarded(async () => chat.show(await conversations.open(id)));
}

async function fresh() {
  leftDrawer.close();
  await chat.show(null);
  byId("composer").focus();
}

async function renamed(change) {
  if (change) await guarded(() => conversations.rename(change.id, change.title));
  await listChanged();
}

async function remove(id, title) {
  if (
    !(await confirmed(
      byId("confirm"),
      "Delete this conversation?",
      `“${title}” will be gone for good.`,
      "Delete",
    ))
  )
    return;
  await guarded(async () => {
    if (id === chat.conversation?.id) await chat.show(null);
    await conversations.remove(id);
  });
  await listChanged();
}

async function removeAll() {
  if (
    !(await confirmed(
      byId("confirm"),
      "Delete all conversations?",
      "Every one of them will be gone for good.",
      "Delete all",
    ))
  )
    return;
  await guarded(async () => {
    await chat.show(null);
    await conversations.removeAll();
  });
  await listChanged();
}

/** Run what may be refused; a refusal is shown, then `otherwise` is done. */
async function guarded(work, otherwise = () => {}) {
  try {
    await work();
    banner.clear("page");
  } catch (error) {
    banner.show("page", error.message, "bad");
    otherwise();
  }
}

// ---- what the agent is doing --------------------------------------------------------------------------

function onSnapshot(snapshot) {
  const cloud = cloudOf(snapshot);
  map.rest(snapshot.loaded_layers ?? [], cloud?.rtt_s ?? null);
  chart.add(snapshot, performance.now() / 1000);
  showDevice(byId("device"), snapshot);
  const trouble = cloudTrouble(snapshot);
  if (trouble) banner.show("cloud", trouble, "bad");
  else banner.clear("cloud");
  if (!chat.busy) followOthers(snapshot.active ?? []);
}

/** A request of another client runs: show its way, and that tokens flow. */
function followOthers(active) {
  const tokens = active.reduce((sum, one) => sum + one.tokens, 0);
  map.run(active[0] ?? null);
  if (tokens > numTokensOfOthers) map.pulse();
  numTokensOfOthers = tokens;
}

function onFeedState(error) {
  if (feedFailed && !error) guarded(load); // the agent may be another one now
  feedFailed = Boolean(error);
  if (error?.code === "unreachable")
    banner.show("agent", "The agent is not reachable. Trying again …", "bad");
  else banner.clear("agent");
}

/** What the controls would mean for the layers. */
function preview({ route, split, shape }, name) {
  if (!["route", "split", "shape"].includes(name)) return;
  const k = split ?? Math.round(numLayers / 2);
  if (route === "local" || route === "offload") map.preview({ route, split: 0, shape: null });
  else if (route === "split" || split !== null)
    map.preview({ route: k === 0 ? "offload" : k === numLayers ? "local" : "split", split: k, shape });
}

async function loadModels() {
  const { data } = await api.json("/v1/models");
  byId("model").replaceChildren(...data.map(({ id }) => el("option", { value: id }, id)));
  numLayers = data[0].isthmus.num_layers;
  map.setModel(numLayers);
  controls.setModel(numLayers);
}

// ---- start --------------------------------------------------------------------------------------------

async function load() {
  await loadModels();
  await listChanged();
  await restore();
}

async function restore() {
  const id = location.hash.slice(1);
  if (!id || id === chat.conversation?.id) return;
  try {
    await chat.show(await conversations.open(id));
  } catch (error) {
    if (error.status !== 404) throw error;
    await chat.show(null);
  }
}

bindTheme(byId("theme"));
fillEmptyState(byId("empty"), (text) => chat.busy || send(text));
byId("new-conversation").addEventListener("click", fresh);
byId("delete-all").addEventListener("click", removeAll);
addEventListener("hashchange", () => guarded(restore));
if (!location.hash.slice(1)) opened(null);
await guarded(load);
feed.start();
byId("composer").focus();
