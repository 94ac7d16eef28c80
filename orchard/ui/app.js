// The dashboard of an Orchard cluster.
//
// The fleet (class Fleet) is changed by the lines of one watch and knows no element. A page is mounted once and then told
// which VMs and workers have changed. `load` of a page reads what the watch does not carry: when the page is opened, and
// after a lost connection. What comes from the cluster becomes text, never markup.
"use strict";

// ---- elements ----

const byId = (id) => document.getElementById(id);

/** Make an element. `on` of the properties holds listeners; the others are attributes, of which false leaves one out. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Make the icon of a state: a copy, since a <use> takes more memory. `label` is its text where none is beside it. */
function mark(state, label = "") {
  const named = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  const shapes = byId(`i-${state}`)?.cloneNode(true).childNodes || [];
  return svg("svg", { class: `mark s-${state}`, viewBox: "0 0 12 12", ...named }, ...shapes);
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

const CONTROLS = "a[href], button, input, select, summary, [tabindex]";
const nameOf = (control) => control.getAttribute("aria-label") || control.name || control.textContent;

const controlsIn = (place) => [...place.querySelectorAll(CONTROLS)].filter((one) => !one.disabled && one.tabIndex >= 0 && one.checkVisibility());

/** Give the focus to the control of that name in a place, else to the one at that position, else to the place's section. */
function focusIn(place, name, at) {
  const controls = controlsIn(place), last = controls[Math.min(at, controls.length - 1)];
  const found = last && nameOf(last) === name ? last : controls.find((one) => nameOf(one) === name) || last || place.closest("section, main");
  if (found.matches("section")) found.tabIndex = -1;
  found.focus({ preventScroll: true });
}

/** Change what is in a place. Where the control with the focus goes, its successor gets it. */
function keepFocus(place, change) {
  const focused = document.activeElement;
  if (place === focused || !place.contains(focused)) return change();
  const name = nameOf(focused), at = controlsIn(place).indexOf(focused);
  change();
  if (document.activeElement === focused) return;
  if (place.contains(focused)) focused.focus({ preventScroll: true });
  else focusIn(place, name, at);
}

const refill = (place, ...children) => keepFocus(place, () => place.replaceChildren(...children));

/** Show items as the children of `parent`. A child stays while its key does; for a changed item it is updated, or else made anew. */
const keyed = (parent, ...more) => keepFocus(parent, () => replaceKeyed(parent, ...more));

function replaceKeyed(parent, items, keyOf, make, update = null) {
  const before = parent.keyedChildren || new Map();
  const after = new Map();
  let next = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = before.get(key);
    const known = child !== undefined && (child.item === item || update !== null);
    if (!known) child = make(item);
    else if (child.item !== item) update(child, item);
    child.item = item;
    after.set(key, child);
    if (child === next) next = next.nextSibling;
    else parent.insertBefore(child, next);
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
  parent.keyedChildren = after;
}

const button = (label, action, properties = {}) => h("button", { type: "button", ...properties, on: { click: action } }, label);

// ---- texts ----

const wholeTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" }).format;
const timeOfDay = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" }).format;
const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

function duration(milliseconds) {
  const s = Math.max(0, milliseconds) / SECOND;
  if (s < 10 && s !== Math.round(s)) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} m`;
  return `${Math.floor(s / 86400)} d`;
}

/** Show how long ago a time was. `tickTimes` keeps it right. */
const ago = (time) => setTime(h("time"), time);

function setTime(element, time) {
  if (time && element.getAttribute("datetime") === time) return element;
  if (time) {
    element.setAttribute("datetime", time);
    element.title = wholeTime(new Date(time));
  } else {
    element.removeAttribute("datetime");
    element.removeAttribute("title");
  }
  element.textContent = time ? since(time) : "–";
  return element;
}

// Milliseconds by which the controller's clock is ahead of the browser's.
let skew = 0;
/** Return the time by the controller's clock, which dates everything that it sends. */
const serverTime = () => Date.now() + skew;

/** Return the time since another one, in whole seconds. */
const since = (time) => duration(Math.floor((serverTime() - Date.parse(time)) / SECOND) * SECOND);

function tickTimes() {
  if (document.hidden) return;
  for (const element of document.querySelectorAll("time[datetime]:not(.absolute)")) setText(element, since(element.getAttribute("datetime")));
}

function clock(seconds) {
  const date = new Date(seconds * SECOND);
  return h("time", { class: "absolute", datetime: date.toISOString(), title: wholeTime(date) }, timeOfDay(date));
}

function bytes(count) {
  if (!count) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(count) / 3));
  const value = count / 1000 ** power;
  return `${value.toFixed(value < 10 && power ? 1 : 0)} ${units[power]}`;
}

// A format is made once: toLocaleString makes one at each call.
const number = new Intl.NumberFormat().format;
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
const pairs = (map) => Object.entries(map || {}).map(([key, value]) => `${key}=${value}`);
const byText = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
/** Orders mac-2 before mac-10. For lists of workers: it takes twenty times as long as `byText`. */
const byNumber = new Intl.Collator(undefined, { numeric: true }).compare;
const shortImage = (image) => (image || "").replace(/^.*\//, "");

const ESCAPES =
  /\x1b\[([0-9;:]*)m|\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[PX^_][^\x1b]*(?:\x1b\\)?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]/g;

/** Return what a terminal shows of a line whose begin was printed over after carriage returns. */
const lastPrinted = (line) => line.split("\r").findLast(Boolean) || "";

/** Return what a terminal shows of a line, without its styles. */
const plainText = (line) => lastPrinted(line).replace(ESCAPES, "");

/** Split a line that a program printed for a terminal into [text, class] pairs. Other control sequences are left out. */
function terminalParts(line) {
  const shown = lastPrinted(line), parts = [];
  const style = { colour: "", bold: false, under: false };
  let end = 0;
  const add = (text) => {
    if (text) parts.push([text, [style.colour, style.bold && "bold", style.under && "under"].filter(Boolean).join(" ")]);
  };
  for (const found of shown.matchAll(ESCAPES)) {
    add(shown.slice(end, found.index));
    end = found.index + found[0].length;
    if (found[1] !== undefined) applyGraphics(style, found[1]);
  }
  add(shown.slice(end));
  return parts;
}

function applyGraphics(style, codes) {
  const numbers = codes.split(/[;:]/).map(Number);
  for (let at = 0; at < numbers.length; at++) {
    const code = numbers[at];
    if (code === 0) Object.assign(style, { colour: "", bold: false, under: false });
    else if (code === 1) style.bold = true;
    else if (code === 4) style.under = true;
    else if (code === 22) style.bold = false;
    else if (code === 24) style.under = false;
    else if (code === 38 || code === 48) at += numbers[at + 1] === 5 ? 2 : 4;
    else if (code === 39) style.colour = "";
    else if ((code >= 30 && code <= 37) || (code >= 90 && code <= 97)) style.colour = `f${code % 10}`;
  }
}

// ---- the fleet in memory ----

const SLOTS = "org.cirruslabs.tart-vms";
const MAX_FAILURES = 500;
const LONG_QUEUE = 10 * MINUTE, LONG_START = 30 * MINUTE;

const hasCondition = (vm, type) => (vm.conditions || []).some((one) => one.type === type && one.state === "true");
const isQueued = (vm) => vm.status !== "failed" && vm.status !== "running" && !vm.worker;
/** Whether no registered worker could ever take a VM, which the controller's reason shows. */
const isNever = (vm) => isQueued(vm) && /^waiting: no worker (?!has registered)/.test(vm.status_message || "");

function vmState(vm) {
  if (vm.status === "failed") return "failed";
  if (vm.status !== "running") return vm.worker ? "starting" : "queued";
  if (vm.powerState && vm.powerState !== "running") return hasCondition(vm, "running") ? "stopping" : vm.powerState;
  return vm.startup_script && vm.startupExitCode === undefined && !hasCondition(vm, "ready") ? "script" : "running";
}

/** Return what a VM does, in a word or two. */
function vmPhase(vm) {
  const state = vmState(vm);
  if (state === "script") return "script runs";
  if (state === "running") return hasCondition(vm, "ready") ? "ready" : "running";
  if (state !== "starting") return state;
  const percent = /^pulling image: (\d+) %/.exec(vm.status_message || "");
  if (percent) return `pull ${percent[1]} %`;
  return /^(pulling|cloning)/.exec(vm.status_message || "")?.[0] || "starting";
}

/** Return a VM's phase and its message. While a VM starts, the message has the phase. */
const vmDescription = (vm) => [vmState(vm) === "starting" && vm.status_message ? "" : vmPhase(vm), vm.status_message].filter(Boolean).join(" · ");

const workerState = (worker) => worker.state || "online";
const slotsOf = (worker) => worker.resources?.[SLOTS] || 0;
const isDiskLow = (disk) => disk?.totalBytes > 0 && (disk.freeBytes < 20e9 || disk.freeBytes < disk.totalBytes / 10);

/** All VMs and workers, by the lines of a watch. `changed` collects what has changed since the last `takeChanges`. */
class Fleet {
  constructor() {
    this.vms = new Map();
    this.workers = new Map();
    // By the name of a worker: its VMs by name.
    this.placed = new Map();
    // The VMs that do not run, by name, and the number of VMs in each state. To look at ten thousand for each change would be slow.
    this.idle = new Map();
    this.counts = {};
    // What has failed since the page was opened, the latest last.
    this.failures = [];
    this.complete = false;
    this.listing = null;
    this.takeChanges();
  }

  apply(line) {
    if (line.type === "BEGIN") {
      this.listing = { vms: new Set(), workers: new Set() };
    } else if (line.type === "BOOKMARK") {
      this.endListing();
    } else {
      const table = line.kind === "vm" ? "vms" : "workers";
      this.listing?.[table].add(line.object.name);
      if (line.kind === "vm") this.putVM(line.type === "DELETED" ? null : line.object, line.object.name);
      else this.putWorker(line.type === "DELETED" ? null : line.object, line.object.name);
    }
  }

  endListing() {
    if (!this.listing) return;
    const { vms, workers } = this.listing;
    for (const name of [...this.vms.keys()]) if (!vms.has(name)) this.putVM(null, name);
    for (const name of [...this.workers.keys()]) if (!workers.has(name)) this.putWorker(null, name);
    this.listing = null;
    this.complete = true;
    this.changed.all = true;
  }

  putVM(vm, name) {
    const old = this.vms.get(name);
    this.count(old, -1);
    this.count(vm, 1);
    if (vm && vm.status !== "running") this.idle.set(name, vm);
    else this.idle.delete(name);
    if (old?.worker) {
      this.placed.get(old.worker)?.delete(name);
      this.changed.workers.add(old.worker);
    }
    if (vm) {
      this.vms.set(name, vm);
      if (vm.worker) {
        if (!this.placed.has(vm.worker)) this.placed.set(vm.worker, new Map());
        this.placed.get(vm.worker).set(name, vm);
        this.changed.workers.add(vm.worker);
      }
    } else {
      this.vms.delete(name);
    }
    if (vm?.status === "failed" && old && old.status !== "failed") this.addFailure(vm, new Date(serverTime()).toISOString());
    this.changed.vms.add(name);
  }

  count(vm, by) {
    if (vm) this.counts[vmState(vm)] = (this.counts[vmState(vm)] || 0) + by;
  }

  clear() {
    for (const table of [this.vms, this.workers, this.placed, this.idle]) table.clear();
    Object.assign(this, { counts: {}, failures: [], complete: false, listing: null });
  }

  putWorker(worker, name) {
    if (worker) {
      // The page of images reads them itself: those of a thousand workers are tens of megabytes.
      delete worker.images;
      this.workers.set(name, worker);
    } else {
      this.workers.delete(name);
      this.placed.delete(name);
    }
    this.changed.workers.add(name);
  }

  addFailure(vm, when) {
    const { name, uid, image, worker, createdBy, status_message: message } = vm;
    this.failures.push({ name, uid, image, worker, createdBy, message, when });
    if (this.failures.length > MAX_FAILURES) this.failures.shift();
  }

  /** Take over the fleet of another tab. */
  load({ vms, workers, failures }) {
    this.apply({ type: "BEGIN" });
    for (const object of vms) this.apply({ type: "ADDED", kind: "vm", object });
    for (const object of workers) this.apply({ type: "ADDED", kind: "worker", object });
    this.failures = failures;
    this.endListing();
  }

  dump() {
    return { vms: [...this.vms.values()], workers: [...this.workers.values()], failures: this.failures };
  }

  takeChanges() {
    const changed = this.changed;
    // The names of what has changed. `all`: draw everything, also what is not there.
    this.changed = { all: false, vms: new Set(), workers: new Set() };
    return changed;
  }

  vmsOn(worker) {
    const found = [...(this.placed.get(worker)?.values() || [])];
    return found.sort((a, b) => byText(a.scheduled_at || "", b.scheduled_at || "") || byText(a.name, b.name));
  }

  queue() {
    const found = [];
    for (const vm of this.idle.values()) if (isQueued(vm)) found.push(vm);
    return found.sort((a, b) => (b.priority || 0) - (a.priority || 0) || byText(a.createdAt || "", b.createdAt || ""));
  }

  totals() {
    const counts = { ...this.counts, online: 0, workers: this.workers.size, slots: 0, used: 0 };
    for (const worker of this.workers.values()) {
      if (workerState(worker) === "online") counts.online++;
      if (workerState(worker) === "offline") continue;
      counts.slots += slotsOf(worker);
      counts.used += Math.min(slotsOf(worker), worker.used?.[SLOTS] || 0);
    }
    return counts;
  }

  /** What needs a human, worst first: {rank, state, title, text, href, since}. */
  problems(now = serverTime()) {
    const found = [];
    for (const worker of this.workers.values()) this.addWorkerProblems(found, worker);
    const { never = [], other = [] } = Object.groupBy(this.idle.values(), (vm) => (isNever(vm) ? "never" : "other"));
    let waiting = 0, oldest = "";
    for (const vm of other) {
      addVMProblem(found, vm, now);
      if (isQueued(vm) && now - Date.parse(vm.createdAt) > LONG_QUEUE) {
        waiting++;
        if (!oldest || vm.createdAt < oldest) oldest = vm.createdAt;
      }
    }
    for (const [reason, vms] of Map.groupBy(never, (vm) => vm.status_message)) {
      const [first] = vms.sort((a, b) => byText(a.createdAt, b.createdAt));
      const [title, href] = vms.length === 1 ? [first.name, address("vm", first.name)] : [plural(vms.length, "VM"), "#/vms?state=queued"];
      found.push({ rank: 1, key: `v ${first.name}`, state: "queued", title, text: `can never be placed – ${reason}`, href, since: first.createdAt });
    }
    if (waiting) {
      const title = `${plural(waiting, "VM")} waiting for long`;
      found.push({ rank: 4, key: "queue", state: "queued", title, text: "the oldest since", href: "#/vms?state=queued", since: oldest });
    }
    return found.sort((a, b) => a.rank - b.rank || byText(a.since || "", b.since || "") || byText(a.title, b.title));
  }

  addWorkerProblems(found, worker) {
    const { name } = worker, href = address("worker", name);
    if (workerState(worker) === "offline") {
      const vms = this.placed.get(name)?.size || 0;
      const text = vms ? `offline, with ${plural(vms, "VM")}` : "offline";
      found.push({ rank: vms ? 0 : 3, key: `w ${name}`, state: "offline", title: name, text, href, since: worker.since });
      return;
    }
    if (isDiskLow(worker.disk)) {
      const text = `disk low: ${bytes(worker.disk.freeBytes)} of ${bytes(worker.disk.totalBytes)} free`;
      found.push({ rank: 3, key: `d ${name}`, state: "warning", title: name, text, href });
    }
    for (const problem of worker.health?.problems || []) {
      const text = `${problem.what}: ${problem.message}`;
      found.push({ rank: 2, key: `h ${name} ${problem.what}`, state: "warning", title: name, text, href, since: problem.since });
    }
  }
}

function addVMProblem(found, vm, now) {
  const { name } = vm, href = address("vm", name), text = vm.status_message || vm.status;
  if ((vm.restart_count || 0) >= 3 && vm.status !== "running") {
    const title = `started ${vm.restart_count} times without success – ${text}`;
    found.push({ rank: 1, key: `v ${name}`, state: "failed", title: name, text: title, href, since: vm.createdAt });
  } else if (vm.worker && vm.status === "pending" && now - Date.parse(vm.scheduled_at) > LONG_START) {
    found.push({ rank: 2, key: `v ${name}`, state: "starting", title: name, text: `assigned and not running – ${text}`, href, since: vm.scheduled_at });
  }
}

const fleet = new Fleet();

// ---- requests ----

// The path before /ui/, which is also that before /v1.
const BASE = location.pathname.replace(/\/ui\/.*$/, "");
const STORED = `orchard ${BASE}`;
const needsCredentials = document.documentElement.dataset.credentials !== "none";

let session = null;
beginSession();

/** Begin a session, by default one in which nobody is signed in: it has no `info`. The requests of the one before are aborted. */
function beginSession(account = "", authorization = "", info = null) {
  session?.ended.abort();
  session = { account, authorization, info, ended: new AbortController() };
}

class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const reasonOf = (error) => (error.status ? error.message : "The controller cannot be reached.");

function authorizationOf(account, token) {
  return `Basic ${btoa(String.fromCharCode(...new TextEncoder().encode(`${account}:${token}`)))}`;
}

/** Send a request below /v1. Raises RequestError for a refusal, TypeError where there is no answer, and AbortError. */
async function send(method, path, { body, signal = session.ended.signal, authorization = session.authorization } = {}) {
  const headers = authorization ? { Authorization: authorization } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(`${BASE}/v1${path}`, {
    method, headers, signal: AbortSignal.any([signal, session.ended.signal]), body: JSON.stringify(body),
    credentials: "omit", cache: "no-store", redirect: "error",
  });
  const ahead = Date.parse(answer.headers.get("Date")) - Date.now();
  // The header has whole seconds.
  if (Math.abs(ahead - skew) > 2 * SECOND) skew = ahead;
  if (answer.ok) return answer;
  // Not every proxy answers with JSON.
  const problem = await answer.json().catch(() => null);
  if (answer.status === 401 && session.info) signOut();
  throw new RequestError(answer.status, problem?.message || `the controller answered ${answer.status}`);
}

const ask = async (path, options) => (await send("GET", path, options)).json();
const vmPath = (name) => `/vms/${encodeURIComponent(name)}`;
const workerPath = (name) => `/workers/${encodeURIComponent(name)}`;

function may(role) {
  const roles = session.info?.roles || [];
  return roles.includes(role) || (role === "compute:connect" && roles.includes("compute:write"));
}

/** Yield the parsed lines of a stream in blocks. The browser can paint between two blocks. */
async function* jsonLines(answer) {
  const decoder = new TextDecoder();
  let [reader, buffer] = readerOf(answer.body);
  let rest = "", since = performance.now();
  try {
    for (;;) {
      const { value, done } = await (buffer ? reader.read(new Uint8Array(buffer)) : reader.read());
      if (done) return;
      if (buffer) buffer = value.buffer;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      yield lines.filter((line) => line.trim()).map((line) => JSON.parse(line));
      if (performance.now() - since > 12) {
        await nextTask();
        since = performance.now();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return a reader, and a buffer that it can use again for each piece, where the browser can: new ones would be much garbage. */
function readerOf(body) {
  try {
    return [body.getReader({ mode: "byob" }), new ArrayBuffer(65536)];
  } catch {
    return [body.getReader(), null];
  }
}

/** Wait for the next task of the event loop. A timer would be slow in a hidden tab. */
function nextTask() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => resolve(channel.port1.close());
    channel.port2.postMessage(0);
  });
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// ---- the stream ----

// Seconds of silence after which the controller sends a line, and after which the connection counts as lost.
const SILENCE = 2, LOST = 4.5;

/** Follows the cluster. One tab of the browser, the leader, has a watch and passes its lines on to the others. */
class Stream {
  constructor() {
    this.id = Math.random().toString(36).slice(2);
    // The leader that sent the last block of lines, and the number of that block.
    this.at = "";
    this.revision = "";
    this.heard = Date.now();
    // Not known before the first answer.
    this.isLive = null;
    // When this tab asked the leader for the whole fleet, and the tabs that wait for it from this one.
    this.asked = 0;
    this.waiting = new Set();
    this.isLeader = false;
    this.ended = session.ended.signal;
  }

  start() {
    const key = `orchard ${BASE} ${session.account}`;
    const timer = setInterval(() => this.checkSilence(), 500);
    this.ended.addEventListener("abort", () => {
      clearInterval(timer);
      this.channel?.close();
    });
    // Without locks, as on a page from plain HTTP, each tab that is seen has a watch of its own.
    if (!navigator.locks) {
      this.lead();
      return;
    }
    this.channel = new BroadcastChannel(key);
    this.channel.onmessage = ({ data }) => this.receive(data);
    this.channel.postMessage({ type: "hello", from: this.id });
    navigator.locks.request(key, { signal: this.ended }, () => this.lead()).catch(() => {});
  }

  // -- in the tab that leads

  async lead() {
    this.isLeader = true;
    let number = 0, pause = 0;
    const tell = (lines) => {
      const before = this.at;
      this.at = `${this.id} ${++number}`;
      for (const line of lines) this.take(line);
      this.channel?.postMessage({ type: "lines", before, at: this.at, lines });
      this.notice(true);
      this.answerWaiting();
    };
    while (!this.ended.aborted) {
      if (!this.channel && document.hidden) {
        await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
        continue;
      }
      try {
        await this.watch(tell);
        pause = 0;
      } catch (error) {
        if (error.status === 401) return;
        if (error.status === 403 && needsCredentials) return signOut({ message: error.message });
        if (error.status === 410) this.revision = "";
        pause = error.status === 410 ? 0 : Math.min(2000, 250 + 2 * pause);
      }
      if (this.ended.aborted) return;
      this.notice(false);
      this.channel?.postMessage({ type: "lost" });
      await sleep(pause + 100 * Math.random());
    }
  }

  /** Follow one watch until it ends or is silent, or is this tab's own and the tab is hidden: a browser has few connections. */
  async watch(tell) {
    const attempt = new AbortController();
    const end = () => attempt.abort();
    if (!this.channel) document.addEventListener("visibilitychange", end, { signal: attempt.signal });
    let guard = setTimeout(end, LOST * SECOND);
    try {
      const since = this.revision ? `&since=${encodeURIComponent(this.revision)}` : "";
      const answer = await send("GET", `/watch?kinds=vms,workers&images=false&silence=${SILENCE}${since}`, { signal: attempt.signal });
      if (!since) tell([{ type: "BEGIN" }]);
      for await (const lines of jsonLines(answer)) {
        clearTimeout(guard);
        guard = setTimeout(end, LOST * SECOND);
        if (lines.length) tell(lines);
      }
    } finally {
      clearTimeout(guard);
      attempt.abort();
    }
  }

  // -- in every tab

  receive(message) {
    if (message.type === "hello" || message.type === "all") {
      this.exchange(message);
    } else if (message.type === "lost") {
      this.notice(false);
    } else if (message.lines[0]?.type === "BEGIN" || message.before === this.at) {
      this.at = message.at;
      for (const line of message.lines) this.take(line);
      this.notice(true);
    } else if (Date.now() - this.asked > 2 * SECOND) {
      // A block was missed, for example by a tab that has just been opened.
      this.asked = Date.now();
      this.channel.postMessage({ type: "hello", from: this.id });
    }
  }

  exchange(message) {
    if (message.type === "hello" && this.isLeader) {
      this.waiting.add(message.from);
      this.answerWaiting();
    } else if (message.type === "all" && !this.isLeader && message.to.includes(this.id)) {
      this.at = message.at;
      this.revision = message.revision;
      fleet.load(message.fleet);
      this.notice(message.isLive);
    }
  }

  answerWaiting() {
    if (!this.waiting.size || !fleet.complete || fleet.listing) return;
    const { at, revision, isLive } = this;
    this.channel.postMessage({ type: "all", to: [...this.waiting], at, revision, isLive, fleet: fleet.dump() });
    this.waiting.clear();
  }

  take(line) {
    fleet.apply(line);
    // A list that is cut off begins anew.
    this.revision = line.type === "BEGIN" ? "" : line.revision || this.revision;
  }

  checkSilence() {
    if (this.isLive !== false && Date.now() - this.heard > LOST * SECOND) this.notice(false);
  }

  notice(isLive) {
    if (isLive) this.heard = Date.now();
    if (isLive !== this.isLive) {
      const isBack = isLive && this.isLive === false;
      this.isLive = isLive;
      frame.showConnection(isLive);
      if (isBack) {
        refreshInfo();
        frame.page.load?.();
      }
    }
    frame.schedule();
  }
}

/** Ask again what this account may do: that may have changed, also while the connection was lost. */
async function refreshInfo() {
  try {
    const roles = JSON.stringify(session.info.roles);
    session.info = await ask("/controller/info");
    if (JSON.stringify(session.info.roles) !== roles) frame.route();
  } catch {
    // A lost connection is shown by the stream.
  }
}

// ---- parts of pages ----

const address = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;

/** Decode a part of an address. A person may have typed one that cannot be decoded. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

const vmLink = (name) => h("a", { href: address("vm", name), class: "clip", title: name, "data-nav": true }, name);
const workerLink = (name) => (name ? h("a", { href: address("worker", name), title: name }, name) : "–");
const clipped = (text, title = text) => h("span", { class: "clip", title }, text);
const titleBar = (...parts) => h("div", { class: "title" }, h("h1", {}, parts.shift()), h("span", { class: "grow" }), ...parts);
const empty = (text) => h("p", { class: "quiet-text" }, text);

/** Return what `read` reads. Where it fails, return null, and show why in a place that has nothing to show yet. */
async function readFor(place, read) {
  try {
    return await read();
  } catch (error) {
    if (place.matches(":has(> .quiet-text:only-child)")) refill(place, empty(reasonOf(error)));
    return null;
  }
}

function panel(title, ...children) {
  return h("section", { class: "panel", "aria-label": title }, h("h2", {}, title), ...children);
}

/** The heading of a page about one worker or VM, whose state is "" if it is not there. */
const titleOf = (name, state, word, actions = []) => [state && mark(state), h("h1", {}, name), h("span", { class: `word s-${state}` }, word), h("div", { class: "row actions" }, actions)];

/** A list of [name, value] pairs, of which those without a value are left out. */
function facts(entries) {
  const shown = entries.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return h("dl", { class: "facts" }, shown.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

const chips = (map, label) => (pairs(map).length ? h("span", { class: "chips", tabindex: "0", role: "group", "aria-label": label }, pairs(map).map((text) => h("span", { class: "chip" }, text))) : "");

function bar(share, label, isBad = false) {
  const fill = h("i", { class: isBad && "bad" });
  fill.style.width = `${Math.round(100 * Math.min(1, share))}%`;
  return h("div", { class: "bar", role: "img", "aria-label": label }, fill);
}

/** A line with a button that copies it. */
function copyLine(text, label) {
  const code = h("code", { tabindex: "0", role: "group", "aria-label": label }, text);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      frame.say(`Copied: ${label}`);
    } catch {
      getSelection().selectAllChildren(code);
      frame.say("Selected. Copy it by the keys of your system.");
    }
  };
  return h("div", { class: "copy" }, code, button("Copy", copy, { "aria-label": `Copy: ${label}` }));
}

/** Ask for a confirmation, or show something. Resolves to the form's data, or null. */
function dialog({ title, body = [], action = "", danger = false }) {
  const opener = document.activeElement, place = opener.closest("section, main, header") || byId("main");
  return new Promise((resolve) => {
    const form = h("form", { method: "dialog" }, h("h2", {}, title), body, h("div", { class: "actions" },
      // It submits nothing: Enter in a field presses the first button that does, and a field that is not valid keeps those shut.
      button(action ? "Cancel" : "Close", () => element.close()),
      action && h("button", { value: "yes", class: danger ? "main danger" : "main" }, action)));
    const element = h("dialog", { "aria-label": title, on: { close: () => {
      const answer = element.returnValue === "yes" ? new FormData(form) : null;
      element.remove();
      // The browser returns the focus to the opener, but that may have been drawn anew since.
      if (!opener.isConnected && document.activeElement === document.body) focusIn(place.isConnected ? place : byId("main"), nameOf(opener), 0);
      resolve(answer);
    } } }, form);
    document.body.append(element);
    element.showModal();
  });
}

/** Carry out an action, and say that it is done, or why it was refused. Return what it returns or true, and null if it failed. */
async function act(action, done) {
  try {
    const result = await action();
    if (done) frame.say(done);
    return result ?? true;
  } catch (error) {
    // The person has signed out.
    if (error.name === "AbortError") return null;
    frame.say(reasonOf(error));
    // A role was taken away.
    if (error.status === 403) refreshInfo();
    return null;
  }
}

/** A button that asks first. */
function actionButton(label, { title, text, danger = false, run, done }) {
  return button(label, async () => {
    const answer = await dialog({ title, body: h("p", {}, text), action: label.replace("…", ""), danger });
    if (answer) act(run, done);
  }, { class: danger && "danger" });
}

/** A table in which only the rows that are seen exist. All rows have the same height. */
class LongTable {
  constructor({ columns, label, makeRow, keyOf, onSort }) {
    Object.assign(this, { columns, makeRow, keyOf, items: [], rowHeight: 33 });
    this.heads = columns.map(({ title, sort, class: name }) => h("th", { scope: "col", class: name }, sort ? button(title, () => onSort(sort)) : title));
    this.body = h("tbody");
    const hidden = { "aria-hidden": "true" };
    [this.above, this.below] = [0, 1].map(() => h("tr", { class: "spacer" }, h("td")));
    this.table = h("table", { class: "fixed", "aria-label": label },
      h("thead", {}, h("tr", {}, this.heads)), h("tbody", hidden, this.above), this.body, h("tbody", hidden, this.below));
    this.element = h("div", { class: "scroll tall", tabindex: "-1" }, this.table);
    this.element.addEventListener("scroll", () => frame.schedule(() => this.draw()), { passive: true });
  }

  show(items, sort) {
    this.keepPlace(items);
    this.items = items;
    this.columns.forEach((column, index) => {
      if (!column.sort) return;
      const order = sort.by === column.sort ? (sort.down ? "descending" : "ascending") : "none";
      this.heads[index].setAttribute("aria-sort", order);
    });
    this.table.setAttribute("aria-rowcount", items.length + 1);
    this.draw();
  }

  /** Scroll by the rows that come or go above, while the table is scrolled or has the pointer or the focus. */
  keepPlace(items) {
    const { element, rowHeight } = this, isRead = element.scrollTop > 0 || this.body.matches(":hover, :focus-within");
    const at = Math.floor(element.scrollTop / rowHeight), first = isRead && this.items[at];
    const now = first ? items.findIndex((item) => this.keyOf(item) === this.keyOf(first)) : -1;
    if (now < 0 || now === at) return;
    this.below.firstChild.style.height = `${items.length * rowHeight}px`;
    element.scrollTop += (now - at) * rowHeight;
  }

  draw() {
    const { scrollTop, clientHeight } = this.element;
    const first = Math.max(0, Math.floor(scrollTop / this.rowHeight) - 12);
    const last = Math.min(this.items.length, first + Math.ceil((clientHeight || 600) / this.rowHeight) + 24);
    this.above.firstChild.style.height = `${first * this.rowHeight}px`;
    this.below.firstChild.style.height = `${(this.items.length - last) * this.rowHeight}px`;
    keyed(this.body, this.items.slice(first, last), this.keyOf, this.makeRow);
    [...this.body.children].forEach((row, index) => row.setAttribute("aria-rowindex", first + index + 2));
  }
}

function table(label, heads, rows) {
  const head = h("tr", {}, heads.map((text) => (text ? h("th", { scope: "col" }, text) : h("td"))));
  return h("div", { class: "scroll" }, h("table", { "aria-label": label }, h("thead", {}, head), h("tbody", {}, rows)));
}

// ---- page: fleet ----

// MAX_NEW_BOXES: boxes of workers that are made in one frame.
const MAX_LISTED = 30, MAX_SLOTS = 12, MAX_NEW_BOXES = 30, SLOT_HEIGHT = 24;

class FleetPage {
  title = "Fleet";

  mount(main) {
    this.groupBy = sessionStorage.getItem(`${STORED} group`) || "";
    this.tiles = h("section", { class: "tiles", "aria-label": "Totals" });
    this.search = h("input", { type: "search", placeholder: "Search ( / )", "aria-label": "Search workers and VMs", on: { input: () => this.drawWorkers() } });
    this.select = h("select", { on: { change: () => this.changeGroup() } });
    this.groups = h("div");
    this.problems = this.list("Needs attention");
    this.queue = this.list("Queue");
    this.failures = this.list("Failures of the last hour");
    this.observer = new IntersectionObserver((entries) => this.onSeen(entries), { rootMargin: "300px" });
    this.boxes = new Map();
    // Rows of slots to use again: new ones would be much garbage while a person scrolls.
    this.spare = [];
    this.earlier = [];
    // Ages, and what has waited for too long.
    this.timer = setInterval(() => document.hidden || this.drawLists(), 30 * SECOND);
    const tools = h("div", { class: "tools" }, h("h2", {}, "Workers"), this.search, h("label", {}, "Group by", this.select));
    main.append(h("h1", { class: "visually-hidden" }, "Fleet"), this.tiles, h("div", { class: "fleet" },
      this.problems.panel, h("section", { class: "workers", "aria-label": "Workers" }, tools, this.groups),
      h("div", { class: "stack" }, this.queue.panel, this.failures.panel)));
  }

  unmount() {
    this.observer.disconnect();
    clearInterval(this.timer);
  }

  list(title) {
    const count = h("span", { class: "count" }), items = h("ul", { class: "list" }), none = empty("");
    return { panel: h("section", { class: "panel", "aria-label": title }, h("h2", {}, title, " ", count), items, none), count, items, none };
  }

  async load() {
    try {
      this.earlier = (await readHistory(HOUR)).filter((vm) => vm.status === "failed").map((vm) => ({ ...vm, when: vm.endedAt }));
      this.drawFailures();
    } catch {
      // The stream says so when the controller cannot be reached.
    }
  }

  update(changed) {
    this.drawTiles();
    if (changed.all) this.drawWorkers();
    else if ([...changed.workers].some((name) => fleet.workers.has(name) !== this.boxes.has(name))) this.drawWorkers(changed.workers);
    else if (this.search.value && changed.vms.size) this.drawWorkers(changed.workers);
    else for (const name of changed.workers) this.drawBox(name);
    this.drawLists();
  }

  drawLists() {
    this.fill(this.problems, fleet.problems(), (one) => `${one.key} ${one.title} ${one.text} ${one.since}`, problemItem, "Nothing needs attention.");
    this.fill(this.queue, fleet.queue(), (vm) => `${vm.uid} ${vm.status_message} ${vm.priority}`, queueItem, "No VM waits for a worker.");
    this.drawFailures();
  }

  fill(list, items, keyOf, make, none) {
    setText(list.count, items.length ? number(items.length) : "");
    // The key has all that an item shows, so none is updated.
    keyed(list.items, items.slice(0, MAX_LISTED), keyOf, make, () => {});
    list.items.hidden = !items.length;
    const more = items.length - MAX_LISTED;
    setText(list.none, items.length ? (more > 0 ? `and ${number(more)} more` : "") : fleet.complete ? none : "Loading…");
    list.none.hidden = !list.none.textContent;
  }

  drawTiles() {
    const t = fleet.totals();
    const tiles = [
      { label: "workers online", state: "online", value: t.online, all: t.workers },
      { label: "slots used", value: t.used, all: t.slots },
      { label: "running", state: "running", value: (t.running || 0) + (t.script || 0) },
      { label: "starting", state: "starting", value: t.starting || 0 },
      { label: "in the queue", state: "queued", value: t.queued || 0 },
      { label: "failed", state: "failed", value: t.failed || 0 },
    ];
    const make = ({ label, state, value, all }) => h("a", { class: value ? "tile" : "tile none", href: all === undefined ? `#/vms?state=${state}` : "#/fleet" },
      h("b", {}, number(value), all !== undefined && h("small", {}, ` / ${number(all)}`)),
      h("span", {}, state && mark(state), label), !state && bar(value / (all || 1), "share of slots used"));
    keyed(this.tiles, tiles, (one) => Object.values(one).join(), make);
  }

  changeGroup() {
    this.groupBy = this.select.value;
    sessionStorage.setItem(`${STORED} group`, this.groupBy);
    this.drawWorkers();
  }

  drawGroupChoices(workers) {
    const keys = new Set();
    for (const worker of workers) for (const key of Object.keys(worker.labels || {})) keys.add(key);
    keys.delete("org.cirruslabs.orchard.worker-name");
    const choices = ["", "state", ...[...keys].sort().map((key) => `label ${key}`)];
    keyed(this.select, choices, (choice) => choice, (choice) => h("option", { value: choice }, choice.replace("label ", "") || "nothing"));
    this.select.value = choices.includes(this.groupBy) ? this.groupBy : "";
  }

  groupOf(worker) {
    if (this.select.value === "") return "";
    if (this.select.value === "state") return workerState(worker);
    const key = this.select.value.replace("label ", "");
    return `${key}=${worker.labels?.[key] ?? "(none)"}`;
  }

  drawWorkers(changed = fleet.workers) {
    this.changed = changed;
    const wanted = this.search.value.trim().toLowerCase();
    const matches = (worker) => !wanted || worker.name.toLowerCase().includes(wanted)
      || [...(fleet.placed.get(worker.name)?.keys() || [])].some((name) => name.toLowerCase().includes(wanted));
    const all = [...fleet.workers.values()].sort((a, b) => byNumber(a.name, b.name));
    this.drawGroupChoices(all);
    const groups = Map.groupBy(all.filter(matches), (worker) => this.groupOf(worker));
    for (const name of this.boxes.keys()) if (!fleet.workers.has(name)) this.dropBox(name);
    const shown = [...groups].sort(([a], [b]) => byNumber(a, b)).map(([name, workers]) => ({ name, workers }));
    if (!shown.length) shown.push({ name: "", none: wanted ? "Nothing matches." : fleet.complete ? "No worker has registered yet." : "Loading…" });
    const make = (group) => {
      const section = h("section", { class: "group" }, group.name && h("h3", {}, group.name), group.none ? empty(group.none) : h("ul", { class: "boxes" }));
      this.drawGroup(section, group);
      return section;
    };
    this.left = MAX_NEW_BOXES;
    keyed(this.groups, shown, (group) => `${group.name} ${group.none || ""}`, make, (section, group) => this.drawGroup(section, group));
    if (this.left < 0) frame.schedule(this.drawMore ||= () => this.drawWorkers(new Set()));
  }

  drawGroup(section, group) {
    if (group.none) return;
    const list = section.querySelector("ul");
    const names = group.workers.map((worker) => worker.name).filter((name) => this.boxes.has(name) || this.left-- > 0);
    keyed(list, names, (name) => name, (name) => this.box(name).element);
    for (const name of names) if (this.changed.has(name) || !this.boxes.get(name).state) this.drawBox(name);
  }

  box(name) {
    if (!this.boxes.has(name)) {
      const box = { name, word: h("span", { class: "word" }), slots: h("ul"), mark: h("i"), state: "", isSeen: false };
      box.element = h("li", { class: "box" }, h("header", {}, box.mark, h("a", { href: address("worker", name), "data-nav": true }, name), box.word), box.slots);
      box.element.box = box;
      this.boxes.set(name, box);
      this.observer.observe(box.element);
    }
    return this.boxes.get(name);
  }

  dropBox(name) {
    this.observer.unobserve(this.boxes.get(name).element);
    this.boxes.delete(name);
  }

  onSeen(entries) {
    for (const { target, isIntersecting } of entries) {
      const { box } = target;
      box.isSeen = isIntersecting;
      frame.schedule(box.draw ||= () => (box.isSeen ? this.drawBox(box.name) : this.clearBox(box)));
    }
  }

  clearBox({ slots }) {
    this.spare.push(...[...slots.children].filter((row) => row.item.uid));
    keyed(slots, [], String, String);
  }

  drawBox(name) {
    const worker = fleet.workers.get(name), box = this.boxes.get(name);
    if (!worker || !box) return;
    const state = workerState(worker), vms = fleet.vmsOn(name);
    if (state !== box.state) {
      const shape = mark(state);
      box.mark.replaceWith(shape);
      box.mark = shape;
      box.state = state;
      setAttribute(box.element, "class", `box ${state}`);
    }
    const low = isDiskLow(worker.disk), ill = worker.health?.problems?.length;
    setAttribute(box.word, "class", `word s-${state === "online" ? (low || ill ? "paused" : "") : state}`);
    setText(box.word, state === "online" ? (low ? "disk low" : ill ? "problems" : "") : state);
    // Stopped VMs use no slot.
    const using = vms.filter((vm) => !["stopped", "suspended", "failed"].includes(vmState(vm)));
    const rest = vms.filter((vm) => !using.includes(vm));
    const free = Math.max(0, slotsOf(worker) - using.length), word = state === "online" ? "free" : "unused";
    const rows = [...using, ...rest, ...Array.from({ length: free }, (_, index) => ({ free: `${word} ${index}`, word }))];
    const hidden = rows.length > MAX_SLOTS ? rows.splice(MAX_SLOTS - 1).length : 0;
    box.slots.style.height = `${SLOT_HEIGHT * (rows.length + (hidden ? 1 : 0))}px`;
    if (!box.isSeen) return;
    if (hidden) rows.push({ more: hidden });
    keyed(box.slots, rows, (row) => row.uid || `${row.free ?? `more ${row.more}`}`, (row) => slotRow(row, this.spare), (child, row) => row.uid && updateSlot(child, row));
  }

  drawFailures() {
    const known = new Map();
    const limit = new Date(serverTime() - HOUR).toISOString();
    for (const vm of this.earlier) known.set(vm.uid, vm);
    for (const vm of fleet.failures) known.set(vm.uid, vm);
    for (const vm of fleet.idle.values()) {
      if (vm.status !== "failed" || known.has(vm.uid)) continue;
      const when = vm.startupEndedAt || vm.restarted_at || vm.started_at || vm.scheduled_at || vm.createdAt;
      known.set(vm.uid, { ...vm, message: vm.status_message, when });
    }
    const shown = [...known.values()].filter((vm) => vm.when > limit).sort((a, b) => byText(b.when, a.when));
    this.fill(this.failures, shown, (vm) => `${vm.uid} ${vm.when} ${isThere(vm)}`, failureItem, "None.");
  }
}

function slotRow(row, spare) {
  if (row.more) return h("li", { class: "slot free" }, h("span"), `and ${row.more} more`);
  if (!row.uid) return h("li", { class: "slot free" }, mark("free"), row.word);
  const item = spare.pop() || h("li", { class: "slot" }, h("a", { class: "clip", "data-nav": true }, h("i"), ""), h("span", { class: "phase" }, "", h("time")));
  updateSlot(item, row);
  return item;
}

function updateSlot(item, vm) {
  const [link, phase] = item.children, state = vmState(vm), [shape, name] = link.childNodes, [word, time] = phase.childNodes;
  if (item.state !== state) shape.replaceWith(mark(state));
  item.state = state;
  setText(name, vm.name);
  setAttribute(link, "title", vm.name);
  setAttribute(link, "href", address("vm", vm.name));
  setText(word, vmPhase(vm));
  setAttribute(phase, "title", vm.status_message || "");
  setTime(time, vm.restarted_at || vm.started_at || vm.scheduled_at || vm.createdAt);
}

function problemItem(one) {
  return h("li", {}, mark(one.state), h("a", { href: one.href, class: "clip", "data-nav": true }, one.title), one.since ? ago(one.since) : h("span"), h("p", {}, one.text));
}

function queueItem(vm) {
  const priority = vm.priority ? `priority ${vm.priority} · ` : "";
  return h("li", {}, mark("queued"), vmLink(vm.name), ago(vm.createdAt), h("p", {}, priority, (vm.status_message || "waiting").replace(/^waiting: /, "")));
}

const isThere = ({ name, uid }) => fleet.vms.get(name)?.uid === uid;

function failureItem(vm) {
  return h("li", {}, mark("failed"), isThere(vm) ? vmLink(vm.name) : clipped(vm.name), ago(vm.when), h("p", {}, vm.message || "failed", vm.worker ? [" · ", workerLink(vm.worker)] : ""));
}

// ---- page: VMs ----

const AGES = [["", "any age"], [HOUR, "over 1 hour"], [DAY, "over 1 day"], [7 * DAY, "over 1 week"]];

const SORTS = {
  state: vmState, name: (vm) => vm.name, owner: (vm) => vm.createdBy || "", worker: (vm) => vm.worker || "",
  image: (vm) => vm.image || "", age: (vm) => vm.createdAt || "",
};

class VMsPage {
  title = "VMs";

  constructor(_name, query) {
    this.initial = query;
  }

  mount(main) {
    this.sort = { by: "age", down: false };
    // By name: the uid, since a VM that was deleted may be followed by another one of its name.
    this.picked = new Map();
    this.filters = this.makeFilters();
    this.count = h("span", { class: "count" });
    this.selection = h("div", { class: "row" });
    this.none = empty("");
    const columns = [
      ...(may("compute:write") ? [{ title: this.pickAll(), class: "c-pick" }] : []),
      { title: "State", sort: "state", class: "c-state" }, { title: "Name", sort: "name" },
      { title: "Owner", sort: "owner", class: "c-owner" }, { title: "Worker", sort: "worker", class: "c-worker" },
      { title: "Image", sort: "image", class: "c-image" }, { title: "Metadata", class: "c-metadata" },
      { title: "Age", sort: "age", class: "c-age" }, { title: "Message", class: "c-message" },
    ];
    this.table = new LongTable({ columns, label: "VMs", keyOf: (vm) => vm.uid, makeRow: (vm) => this.row(vm), onSort: (by) => this.changeSort(by) });
    this.table.element.append(this.none);
    main.append(h("div", { class: "title" }, h("h1", {}, "VMs"), this.count, h("span", { class: "grow" }), this.selection), this.filters, this.table.element);
  }

  makeFilters() {
    const changed = () => this.draw();
    const input = (name, label, placeholder = label) => h("input", { type: "search", name, "aria-label": label, placeholder, value: this.initial.get(name) || "", size: 14, on: { input: changed } });
    const select = (name, label, choices) => {
      const options = choices.map(([value, text]) => h("option", { value, selected: value === this.initial.get(name) }, text));
      return h("select", { name, "aria-label": label, on: { change: changed } }, options);
    };
    const states = ["queued", "starting", "script", "running", "stopping", "stopped", "suspended", "failed"];
    return h("form", { class: "tools", role: "search", on: { submit: (event) => event.preventDefault() } },
      input("name", "Name", "Name ( / )"), select("state", "State", [["", "any state"], ...states.map((state) => [state, state])]),
      input("owner", "Owner"), input("image", "Image"), input("label", "Label k=v"), input("metadata", "Metadata k=v"), select("age", "Age", AGES));
  }

  pickAll() {
    const pick = (event) => {
      this.picked = new Map(event.target.checked ? this.shown.map((vm) => [vm.name, vm.uid]) : []);
      this.redraw();
    };
    return (this.all = h("input", { type: "checkbox", "aria-label": "Select all that are shown", on: { change: pick } }));
  }

  changeSort(by) {
    this.sort = { by, down: this.sort.by === by && !this.sort.down };
    this.draw();
  }

  update(changed) {
    if (changed.all || changed.vms.size) this.draw();
  }

  redraw() {
    keyed(this.table.body, [], String, String);
    this.draw();
  }

  draw() {
    const matches = vmFilter(new FormData(this.filters));
    const found = [];
    for (const vm of fleet.vms.values()) if (matches(vm)) found.push(vm);
    // The youngest was created last, so ages ascend where times descend.
    const of = SORTS[this.sort.by], turn = this.sort.down === (this.sort.by === "age") ? 1 : -1;
    this.shown = found.sort((a, b) => turn * byText(of(a), of(b)) || byText(a.name, b.name));
    for (const [name, uid] of this.picked) if (fleet.vms.get(name)?.uid !== uid) this.picked.delete(name);
    setText(this.count, found.length === fleet.vms.size ? number(found.length) : `${number(found.length)} of ${number(fleet.vms.size)}`);
    this.table.show(found, this.sort);
    setText(this.none, found.length ? "" : !fleet.complete ? "Loading…" : fleet.vms.size ? "No VM matches." : "There is no VM.");
    this.drawSelection();
  }

  row(vm) {
    const cell = (name, ...content) => h("td", { class: `c-${name}` }, ...content);
    const metadata = pairs(vm.metadata).join(" ");
    return h("tr", {}, may("compute:write") && cell("pick", this.pick(vm)), cell("state", mark(vmState(vm)), vmPhase(vm)), cell("name", vmLink(vm.name)),
      cell("owner", vm.createdBy || "–"), cell("worker", workerLink(vm.worker)), h("td", { class: "c-image", title: vm.image }, shortImage(vm.image)),
      h("td", { class: "c-metadata", title: metadata }, metadata), cell("age", ago(vm.createdAt)), h("td", { class: "c-message dim", title: vm.status_message || "" }, vm.status_message || ""));
  }

  pick(vm) {
    const change = (event) => {
      if (event.target.checked) this.picked.set(vm.name, vm.uid);
      else this.picked.delete(vm.name);
      this.drawSelection();
    };
    const box = h("input", { type: "checkbox", "aria-label": `Select ${vm.name}`, on: { change } });
    box.checked = this.picked.has(vm.name);
    return box;
  }

  drawSelection() {
    const count = this.picked.size;
    if (this.all) this.all.checked = this.shown.length > 0 && this.shown.every((vm) => this.picked.has(vm.name));
    const items = count ? [{ count }] : [];
    keyed(this.selection, items, (item) => item.count, () => h("span", { class: "row" }, `${number(count)} selected`, button("Delete…", () => this.deletePicked(), { class: "danger" })));
  }

  async deletePicked() {
    const left = [...this.picked], count = plural(left.length, "VM");
    const list = left.slice(0, 20).map(([name]) => name).join(", ") + (left.length > 20 ? ` and ${left.length - 20} more` : "");
    if (!(await dialog({ title: `Delete ${count}?`, body: h("p", {}, list), action: "Delete", danger: true }))) return;
    // The first refusal ends it, and what is left stays selected.
    const work = async () => {
      while (left.length) {
        const [name, uid] = left.pop();
        if (fleet.vms.get(name)?.uid !== uid) continue;
        try {
          await send("DELETE", vmPath(name));
        } catch (error) {
          if (error.status === 404) continue;
          left.length = 0;
          throw error;
        }
      }
    };
    // More at the same time would take the connections of the other tabs.
    await act(() => Promise.all([work(), work()]), `Deleted ${count}`);
  }
}

/** Return a function that tells whether a VM matches all filters of a form. */
function vmFilter(form) {
  const wanted = (name) => (form.get(name) || "").trim().toLowerCase();
  const [name, state, owner, image, label, metadata] = ["name", "state", "owner", "image", "label", "metadata"].map(wanted);
  const before = form.get("age") ? new Date(serverTime() - form.get("age")).toISOString() : "";
  const has = (map, text) => !text || pairs(map).some((pair) => pair.toLowerCase().includes(text));
  const includes = (value, text) => !text || (value || "").toLowerCase().includes(text);
  return (vm) => includes(vm.name, name) && (!state || vmState(vm) === state || (state === "running" && vmState(vm) === "script"))
    && includes(vm.createdBy, owner) && includes(vm.image, image) && has(vm.labels, label) && has(vm.metadata, metadata) && (!before || vm.createdAt < before);
}

// ---- page: worker ----

class WorkerPage {
  constructor(name) {
    this.name = name;
    this.title = name;
  }

  mount(main) {
    this.heading = h("div", { class: "title" });
    this.state = h("div");
    this.disk = h("div", { class: "disk" });
    this.images = h("div", { class: "images" }, empty("Loading…"));
    this.none = empty("");
    this.vms = h("ul", { class: "list" });
    this.past = h("div", {}, empty("Loading…"));
    // What is read later is below what is there at once. A worker that is gone still has its last VMs.
    this.rest = [h("div", { class: "stack" }, panel("State", this.state), panel("VMs", h("div", { class: "two" }, this.vms, this.none))), panel("Disk and images", this.disk, this.images)];
    main.append(this.heading, h("div", { class: "columns halves" }, this.rest[0], h("div", { class: "stack" }, this.rest[1], panel("Last fifty VMs", this.past))));
    this.timer = setInterval(() => document.hidden || this.loadDetails(), 15 * SECOND);
  }

  load() {
    if (this.drawn) this.loadDetails();
    this.loadPast();
  }

  unmount() {
    clearInterval(this.timer);
  }

  update(changed) {
    if (changed.all || changed.workers.has(this.name)) this.draw();
  }

  draw() {
    const worker = fleet.workers.get(this.name);
    for (const part of this.rest) part.hidden = !worker && !this.drawn;
    if (!worker) {
      refill(this.heading, ...titleOf(this.name, "", fleet.complete ? "There is no such worker." : "Loading…"));
      return;
    }
    if (!this.drawn) {
      this.drawDisk(worker);
      this.loadDetails();
    }
    const state = workerState(worker);
    if (this.drawn !== state) refill(this.heading, ...titleOf(this.name, state, state, this.actions(worker, state)));
    this.drawn = state;
    const used = Object.entries(worker.resources || {}).map(([name, amount]) => [name, `${worker.used?.[name] || 0} of ${amount} used`]);
    refill(this.state, facts([
      ["state", [state, worker.since && [" for ", ago(worker.since)]]], ["drain ends", worker.drain?.deadline && wholeTime(new Date(worker.drain.deadline))],
      ...(worker.health?.problems || []).map((one) => [one.what, h("span", { class: "s-warning" }, one.message)]),
      ["architecture", `${worker.arch || "arm64"}, ${worker.runtime || "tart"}`], ["labels", chips(worker.labels, "labels")], ...used,
      ["registered", worker.createdAt && wholeTime(new Date(worker.createdAt))], ["by", worker.registeredBy],
      ["versions", worker.versions && [worker.versions.orchard && `orchard ${worker.versions.orchard}`, worker.versions.tart && `tart ${worker.versions.tart}`, worker.versions.os].filter(Boolean).join(", ")],
    ]));
    const vms = fleet.vmsOn(this.name);
    keyed(this.vms, vms, (vm) => vm.uid, (vm) => h("li", {}, mark(vmState(vm)), vmLink(vm.name), ago(vm.scheduled_at), h("p", {}, vmDescription(vm))));
    setText(this.none, vms.length ? "" : "None.");
  }

  actions(worker, state) {
    if (!may("compute:write")) return [];
    const path = workerPath(this.name);
    const pause = (scheduling_paused) => () => send("PUT", path, { body: { name: this.name, scheduling_paused } });
    return [
      ["online", "offline"].includes(state) && !worker.scheduling_paused && button("Pause", () => act(pause(true), `${this.name} takes no new VMs`)),
      worker.scheduling_paused && button("Resume", () => act(pause(false), `${this.name} takes VMs again`)),
      button("Drain…", () => this.drain()),
      actionButton("Delete…", { title: `Delete the worker ${this.name}?`, text: "Its VMs fail.", danger: true, run: () => send("DELETE", path), done: `Deleted ${this.name}` }),
    ];
  }

  async drain() {
    const field = h("input", { type: "number", name: "minutes", min: 0, max: 525600, placeholder: "none" });
    const answer = await dialog({ title: `Drain ${this.name}`, action: "Drain", body: [
      h("p", { class: "dim" }, "It takes no new VMs. Those that run there go on until they end, or until the deadline; 0 ends them now."),
      h("label", { class: "stacked" }, "Deadline in minutes", field)] });
    if (!answer) return;
    const minutes = answer.get("minutes");
    const body = minutes === "" ? {} : Number(minutes) ? { deadlineSeconds: Math.round(60 * Number(minutes)) } : { now: true };
    act(() => send("POST", `${workerPath(this.name)}/drain`, { body }), `${this.name} is draining`);
  }

  async loadDetails() {
    if (!fleet.workers.has(this.name)) return;
    const worker = await readFor(this.images, () => ask(workerPath(this.name)));
    if (!worker) return;
    this.drawDisk(worker);
    const rows = (worker.images || []).map((image) => h("tr", {}, h("td", {}, image.name), h("td", {}, bytes(image.sizeBytes)), h("td", {}, image.lastUsed ? ago(image.lastUsed) : "–")));
    refill(this.images, rows.length ? table("Images", ["Image", "Size", "Last used"], rows) : empty("It has reported no images."));
  }

  drawDisk({ disk, pulling }) {
    const used = disk ? 1 - disk.freeBytes / disk.totalBytes : 0;
    const free = facts([["free", disk && `${bytes(disk.freeBytes)} of ${bytes(disk.totalBytes)}`], ["pulling", clipped(pulling ? `${pulling.percent || 0} %, ${pulling.image}` : "–")]]);
    refill(this.disk, disk ? bar(used, "share of the disk used", isDiskLow(disk)) : empty("The worker reports no disk."), free);
  }

  async loadPast() {
    const ended = await readFor(this.past, loadHistory);
    if (!ended) return;
    const own = ended.filter((vm) => vm.worker === this.name).slice(-50).reverse();
    const [mine, all] = [own, ended].map(summary);
    const row = (label, key, show) => h("tr", {}, h("th", { scope: "row" }, label), h("td", {}, show(mine[key])), h("td", {}, show(all[key])));
    const percent = (value) => (value === null ? "–" : `${Math.round(100 * value)} %`);
    const time = (value) => (value === null ? "–" : duration(value));
    refill(this.past,
      table("Compared with the fleet", ["Mean", "This worker", "Fleet"], [row("failed", "failed", percent), row("time to boot", "boot", time), row("time it ran", "run", time)]),
      own.length ? h("ul", { class: "list" }, own.map((vm) => h("li", {}, mark(vm.status === "failed" ? "failed" : "stopped", vm.status), clipped(vm.name), ago(vm.endedAt), h("p", {}, vm.message || `ended ${vm.status}`)))) : empty("No VM of this worker has ended yet."));
  }
}

// ---- page: VM ----

// Fields that the controller or the worker sets, which are not part of a specification.
const SET_BY_OTHERS = ["uid", "createdAt", "createdBy", "version", "generation", "observedGeneration", "status", "status_message", "worker", "assignedCPU", "assignedMemory",
  "scheduled_at", "started_at", "restarted_at", "restart_count", "localName", "tartName", "conditions", "image_fqn", "expiresAt", "startupExitCode", "startupEndedAt", "endedAt", "endRequest", "waitingSince"];
const SCRIPT_FIELDS = ["startup_script", "startupOnFailure", "startupTimeoutSeconds", "net-softnet", "powerState"];

function specification(vm) {
  return Object.fromEntries(Object.entries(vm).filter(([name]) => !SET_BY_OTHERS.includes(name)));
}

class VMPage {
  constructor(name) {
    this.name = name;
    this.title = name;
  }

  mount(main) {
    this.heading = h("div", { class: "title vm" });
    this.facts = h("div");
    this.timeline = h("ol", { class: "timeline", tabindex: "0", "aria-label": "Timeline" });
    this.spec = h("div");
    this.log = new LogView(this.name, (event) => this.addLifecycle(event));
    this.lifecycle = [];
    this.rest = h("div", { class: "columns halves" }, panel("State", this.facts), panel("Timeline", this.timeline), h("div", { class: "wide" }, this.log.element),
      may("compute:connect") && panel("Connect", connectLines(this.name)), panel("Specification", this.spec));
    main.append(this.heading, this.rest);
  }

  load() {
    this.log.restart();
  }

  unmount() {
    this.log.stop();
  }

  update(changed) {
    if (changed.all || changed.vms.has(this.name)) this.draw();
  }

  draw() {
    const vm = fleet.vms.get(this.name);
    this.rest.hidden = !vm && !this.vm;
    if (!vm) {
      const text = fleet.complete ? (this.vm ? "deleted" : "There is no such VM.") : "Loading…";
      refill(this.heading, ...titleOf(this.name, "", text));
      // One that was not there yet may be created.
      if (this.vm) this.log.end();
      this.drawn = "";
      return;
    }
    if (this.vm && this.vm.uid !== vm.uid) {
      frame.route();
      return;
    }
    this.vm = vm;
    const state = vmState(vm), drawn = `${state} ${vmPhase(vm)} ${vm.suspendable}`;
    if (drawn !== this.drawn) refill(this.heading, ...titleOf(this.name, state, vmPhase(vm), this.actions(vm, state)));
    this.drawn = drawn;
    refill(this.facts, facts([
      ["message", vm.status_message || "–"], ["worker", workerLink(vm.worker)], ["image", vm.image], ["digest", clipped(vm.image_fqn || "–")], ["owner", vm.createdBy], ["created", vm.createdAt && [ago(vm.createdAt), " ago"]],
      ["expires", vm.expiresAt && wholeTime(new Date(vm.expiresAt))], ["restarts", vm.restart_count || 0], ["exit code", vm.startupExitCode ?? (vm.startup_script && "–")],
      ["CPUs, memory", vm.assignedCPU ? `${vm.assignedCPU}, ${vm.assignedMemory} MiB` : "–"], ["labels", chips(vm.labels, "labels")], ["metadata", chips(vm.metadata, "metadata")],
    ]));
    this.drawSpecification(vm);
  }

  drawSpecification(vm) {
    const spec = specification(vm), text = JSON.stringify(spec, null, 2);
    if (text === this.specText) return;
    this.specText = text;
    const show = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
    const asTable = table("Specification", ["Field", "Value"], Object.entries(spec).map(([name, value]) => h("tr", {}, h("td", { class: "mono" }, name), h("td", {}, name === "password" ? "••••" : ["labels", "metadata"].includes(name) ? chips(value, name) : show(value)))));
    const asJSON = h("pre", { class: "json", tabindex: "0", role: "group", "aria-label": "Specification as JSON", hidden: true }, JSON.stringify({ ...spec, password: undefined }, null, 2));
    const toggle = button("JSON", () => {
      asJSON.hidden = !asJSON.hidden;
      asTable.hidden = !asJSON.hidden;
      toggle.setAttribute("aria-pressed", String(!asJSON.hidden));
    }, { "aria-pressed": "false" });
    refill(this.spec, toggle, asTable, asJSON);
  }

  addLifecycle(event) {
    this.lifecycle.push(event);
    if (this.lifecycle.length > 64) this.lifecycle.shift();
    const total = Math.max(1, this.lifecycle.at(-1).timestamp - this.lifecycle[0].timestamp);
    refill(this.timeline, ...this.lifecycle.map((one, index) => {
      const next = this.lifecycle[index + 1], seconds = next ? next.timestamp - one.timestamp : null;
      const fill = h("i");
      fill.style.width = `${(100 * (seconds || 0)) / total}%`;
      fill.style.marginLeft = `${(100 * (one.timestamp - this.lifecycle[0].timestamp)) / total}%`;
      return h("li", {}, clock(one.timestamp), h("span", {}, plainText(one.payload)), h("span", { class: "dim" }, seconds === null ? "" : duration(seconds * SECOND)), seconds ? h("div", { class: "bar" }, fill) : null);
    }));
  }

  actions(vm, state) {
    if (!may("compute:write")) return [];
    const path = vmPath(this.name);
    const power = (powerState) => () => send("PATCH", path, { body: { powerState } });
    const isOn = (vm.powerState || "running") === "running" && state !== "failed";
    return [
      isOn && vm.status === "running" && actionButton("Stop…", { title: `Stop ${this.name}?`, text: "It cannot be started again. Its disk stays on its worker until it is deleted.", run: power("stopped"), done: `${this.name} stops` }),
      isOn && vm.suspendable && vm.status === "running" && actionButton("Suspend…", { title: `Suspend ${this.name}?`, text: "It cannot be resumed by itself; a new VM can be cloned from it.", run: power("suspended"), done: `${this.name} is being suspended` }),
      vm.status !== "pending" && actionButton("Restart…", { title: `Restart ${this.name}?`, text: "It starts anew from its image; what is on its disk is lost.", run: () => send("POST", `${path}/restart`), done: `${this.name} restarts` }),
      button("Token…", () => this.issueToken()), button("Again with a shell", () => this.startAgain(vm)),
      actionButton("Delete…", { title: `Delete ${this.name}?`, text: "Its disk is deleted with it.", danger: true, run: () => send("DELETE", path), done: `Deleted ${this.name}` }),
    ];
  }

  async issueToken() {
    const hours = h("input", { type: "number", name: "hours", min: 1, max: 720, value: 24, required: true });
    const answer = await dialog({ title: "Token for a colleague", action: "Issue", body: [
      h("p", { class: "dim" }, "Whoever has it can connect to this VM, and do nothing else."), h("label", { class: "stacked" }, "Valid for hours", hours)] });
    if (!answer) return;
    const ttlSeconds = Math.round(3600 * Number(answer.get("hours")));
    const issued = await act(async () => (await send("POST", `${vmPath(this.name)}/access-tokens`, { body: { ttlSeconds } })).json());
    if (!issued) return;
    await dialog({ title: `Token for ${this.name}`, body: [h("p", { class: "dim" }, `It is shown only now, and ends ${wholeTime(new Date(issued.expiresAt))}. At the SSH server it is the password of the user token.`), copyLine(issued.token, "token")] });
  }

  async startAgain(vm) {
    const spec = Object.fromEntries(Object.entries(specification(vm)).filter(([name]) => !SCRIPT_FIELDS.includes(name)));
    spec.name = `${this.name}-shell`;
    for (let n = 2; fleet.vms.has(spec.name); n++) spec.name = `${this.name}-shell-${n}`;
    if (await act(() => send("POST", "/vms", { body: spec }), `Created ${spec.name}`)) location.hash = address("vm", spec.name);
  }
}

function connectLines(name) {
  const lines = [["ssh", `ssh vm ${name}`], ["exec", `exec vm ${name} -it`], ["port forward", `port-forward vm ${name} 8080:80`], ["VNC", `vnc vm ${name}`]];
  return lines.map(([label, line]) => copyLine(`orchard ${line}`, label));
}

// ---- the log of a VM ----

// What a log keeps in memory. Beyond that its oldest lines are dropped, so many that this share is left.
const MAX_LINES = 200000, MAX_CHARACTERS = 60e6, LEFT = 0.95, MAX_SHOWN = 4000, LINE_HEIGHT = 18;

class LogView {
  constructor(name, onLifecycle) {
    Object.assign(this, { name, onLifecycle, lines: [], characters: 0, dropped: 0, cursor: "", follows: true, isOver: false });
    // Those that match the search.
    this.shown = this.lines;
    this.rows = h("div", { class: "rows" });
    this.sizer = h("div");
    this.box = h("div", { class: "logbox", tabindex: "0", role: "log", "aria-label": "Log", "aria-live": "off", on: { scroll: () => this.onScroll() } }, this.sizer, this.rows);
    this.search = h("input", { type: "search", placeholder: "Search the log ( / )", "aria-label": "Search the log", on: { input: () => this.select() } });
    this.status = h("span", { class: "dim" });
    this.toggle = button("Follow", () => this.setFollow(!this.follows), { "aria-pressed": "true" });
    const tools = h("div", { class: "tools" }, h("h2", {}, "Log"), this.status, h("span", { class: "grow" }), this.search, this.toggle, button("Download", () => this.download()));
    this.element = h("section", { class: "panel", "aria-label": "Log" }, tools, this.box);
    this.onVisibility = () => (document.hidden ? this.pause() : this.start());
  }

  /** Follow while the tab is seen: a browser has few connections to a site. */
  start() {
    document.addEventListener("visibilitychange", this.onVisibility);
    if (!this.attempt && !this.isOver && !document.hidden) this.run();
  }

  restart() {
    this.pause();
    this.start();
  }

  pause() {
    this.attempt?.abort();
    this.attempt = null;
  }

  stop() {
    document.removeEventListener("visibilitychange", this.onVisibility);
    this.pause();
  }

  end() {
    this.isOver = true;
    this.drawStatus();
  }

  async run() {
    const attempt = (this.attempt = new AbortController());
    while (!attempt.signal.aborted && !this.isOver) {
      if (fleet.vms.has(this.name)) await this.read(attempt.signal);
      await sleep(SECOND);
    }
  }

  async read(signal) {
    try {
      const cursor = this.cursor ? `&cursor=${encodeURIComponent(this.cursor)}` : "";
      const answer = await send("GET", `${vmPath(this.name)}/events?follow=true&kinds=log_line,lifecycle${cursor}`, { signal });
      for await (const events of jsonLines(answer)) this.add(events);
    } catch (error) {
      // The connection is lost, the VM is gone, or the page was left; or the controller has lost the last events that are shown.
      if (error.status === 400 && !signal.aborted) frame.route();
    }
  }

  add(events) {
    const wanted = this.search.value.toLowerCase();
    for (const event of events) {
      this.cursor = event.cursor || this.cursor;
      if (event.kind === "lifecycle") this.onLifecycle(event);
      // Without the cursor, which would take as much memory as a line.
      const { kind, payload = "", timestamp } = event, line = { kind, payload, timestamp };
      this.lines.push(line);
      this.characters += payload.length;
      if (wanted && matchesText(line, wanted)) this.shown.push(line);
    }
    if (this.lines.length > MAX_LINES || this.characters > MAX_CHARACTERS) this.drop();
    this.drawSoon();
  }

  drop() {
    let count = 0;
    while (this.lines.length - count > LEFT * MAX_LINES || this.characters > LEFT * MAX_CHARACTERS) this.characters -= this.lines[count++].payload.length;
    this.lines.splice(0, count);
    this.dropped += count;
    if (!this.follows && !this.search.value) this.box.scrollTop -= count * LINE_HEIGHT;
    this.select();
  }

  select() {
    const wanted = this.search.value.toLowerCase();
    this.shown = wanted ? this.lines.filter((event) => matchesText(event, wanted)) : this.lines;
    this.drawSoon();
  }

  drawSoon() {
    frame.schedule(this.drawLater ||= () => this.draw());
  }

  draw() {
    const { shown, box } = this;
    this.sizer.style.height = `${shown.length * LINE_HEIGHT}px`;
    const bottom = Math.max(0, shown.length * LINE_HEIGHT - box.clientHeight);
    const top = this.follows ? bottom : Math.min(box.scrollTop, bottom);
    const first = Math.max(0, Math.floor(top / LINE_HEIGHT) - 20);
    const last = Math.min(shown.length, first + Math.ceil(box.clientHeight / LINE_HEIGHT) + 40);
    this.rows.style.transform = `translateY(${first * LINE_HEIGHT}px)`;
    keyed(this.rows, shown.slice(first, last), (event) => event, logRow);
    // The rows of before may have been further down. What `onScroll` sees beside this was done by a person.
    if (this.follows) box.scrollTop = box.scrollHeight;
    this.lastTop = box.scrollTop;
    this.drawStatus();
  }

  drawStatus() {
    const { shown, lines, dropped } = this;
    const found = this.search.value ? `${number(shown.length)} of ` : "";
    const more = dropped ? `, ${number(dropped)} earlier ones dropped` : "";
    setText(this.status, `${found}${plural(lines.length, "line")}${more}${this.isOver ? ", ended" : ""}`);
  }

  onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.box;
    if (this.lastTop !== undefined && scrollTop < this.lastTop - 2 && this.follows) this.setFollow(false);
    else if (scrollTop + clientHeight >= scrollHeight - 2 && !this.follows && scrollTop > (this.lastTop || 0)) this.setFollow(true);
    this.lastTop = scrollTop;
    this.drawSoon();
  }

  setFollow(follows) {
    this.follows = follows;
    this.toggle.setAttribute("aria-pressed", String(follows));
    this.drawSoon();
  }

  download() {
    const text = this.lines.map((line) => `${plainText(line.payload)}\n`);
    const url = URL.createObjectURL(new Blob(text, { type: "text/plain" }));
    h("a", { href: url, download: `${this.name}.log` }).click();
    setTimeout(() => URL.revokeObjectURL(url), MINUTE);
  }
}

const matchesText = (line, wanted) => plainText(line.payload).toLowerCase().includes(wanted);

function logRow(event) {
  const parts = terminalParts(event.payload.slice(0, MAX_SHOWN));
  const time = clock(event.timestamp);
  return h("div", { class: event.kind === "lifecycle" ? "life" : "" }, time, parts.map(([text, style]) => (style ? h("span", { class: style }, text) : text)));
}

// ---- page: images ----

// Workers of an image whose names are shown.
const MAX_NAMED = 20;
const LABELS = "[\\s,]*([^\\s,=]+=[^\\s,]*([\\s,]+|$))*";

const isSame = (a, b) => JSON.stringify(a) === JSON.stringify(b);

class ImagesPage {
  title = "Images";
  pulling = [];
  readAt = 0;

  mount(main) {
    this.list = h("div", {}, empty("Loading…"));
    this.pulls = h("ul", { class: "list" });
    this.settings = h("div");
    this.aside = h("div", { class: "stack", hidden: true }, panel("Pre-pull", this.settings), panel("Being pulled", this.pulls));
    main.append(titleBar("Images", may("admin:write") && button("Pre-pull…", () => this.addPrepull(""))),
      h("div", { class: "columns aside" }, panel("On workers", this.list), this.aside));
    // A slow connection may need longer than the interval for all images.
    this.timer = setInterval(() => document.hidden || this.isLoading || this.load(), 30 * SECOND);
  }

  unmount() {
    clearInterval(this.timer);
    this.attempt.abort();
  }

  update(changed) {
    if (changed.all || changed.vms.size) this.drawPulls();
  }

  async load() {
    this.isLoading = true;
    const settings = await readFor(this.list, async () => {
      await this.loadWorkers();
      return ask(may("admin:read") ? "/cluster-settings" : "/controller/info");
    });
    this.isLoading = false;
    if (!settings) return;
    this.prepull = settings.prepull || [];
    this.aside.hidden = false;
    this.drawList();
    this.drawPulls();
    this.drawPrepull();
  }

  /** Read the workers one by one, and of many the images rarely: a thousand workers have tens of megabytes of them. */
  async loadWorkers() {
    const images = new Map(), pulling = [], withImages = Date.now() - this.readAt > (this.count > 100 ? 10 * MINUTE : 0);
    let count = 0;
    const attempt = (this.attempt = new AbortController());
    try {
      const answer = await send("GET", `/watch?kinds=workers&images=${withImages}`, { signal: attempt.signal });
      for await (const lines of jsonLines(answer)) {
        for (const { object: worker } of lines.filter((line) => line.kind === "worker")) {
          count++;
          if (worker.pulling) pulling.push({ ...worker.pulling, worker: worker.name });
          for (const image of worker.images || []) addImage(images, image, worker.name);
        }
        if (lines.some((line) => line.type === "BOOKMARK")) break;
      }
    } finally {
      attempt.abort();
    }
    Object.assign(this, { pulling, count }, withImages && { images, readAt: Date.now() });
  }

  drawList() {
    const rows = [...this.images.values()].sort((a, b) => b.count - a.count || byText(a.name, b.name)).slice(0, 500).map((image) =>
      h("tr", {}, h("td", {}, image.name), h("td", { title: `${image.workers.join(", ")}${image.count > MAX_NAMED ? " …" : ""}` }, `${number(image.count)} of ${number(this.count)}`),
        h("td", {}, bytes(image.size)), h("td", {}, image.lastUsed ? ago(image.lastUsed) : "–"),
        h("td", {}, may("admin:write") && !this.isPrepulled(image.name) && button("Pre-pull…", () => this.addPrepull(image.name), { class: "quiet", "aria-label": `Pre-pull ${image.name}` }))));
    refill(this.list, rows.length ? table("Images", ["Image", "Workers", "Size", "Last used", ""], rows) : empty("No worker has reported an image."));
  }

  isPrepulled(name) {
    return this.prepull.some((one) => one.image === name);
  }

  drawPulls() {
    const pulls = [];
    for (const { image, percent, worker } of this.pulling) pulls.push({ key: `w ${worker}`, image, text: `${percent || 0} %, in advance`, worker });
    for (const vm of fleet.vms.values()) if (/^pull/.test(vmPhase(vm))) pulls.push({ key: vm.uid, image: vm.image, text: `${vmPhase(vm)} for ${vm.name}`, worker: vm.worker });
    keyed(this.pulls, pulls.length ? pulls : [{ key: "", none: true }], (one) => `${one.key} ${one.text}`, (one) => (one.none ? h("li", { class: "none" }, h("p", {}, "Nothing.")) : h("li", {}, mark("starting"), clipped(shortImage(one.image), one.image), workerLink(one.worker), h("p", {}, one.text))));
  }

  drawPrepull() {
    const items = this.prepull.map((one) => h("li", {}, h("span"), clipped(one.image),
      may("admin:write") ? button("Remove", () => this.change((all) => all.filter((other) => !isSame(other, one)), "It is not pulled in advance any more"), { class: "quiet", "aria-label": `Remove ${one.image}` }) : h("span"), h("p", {}, pairs(one.labels).join(" ") || "every worker")));
    refill(this.settings, items.length ? h("ul", { class: "list" }, items) : empty("No image is pulled in advance."));
  }

  async addPrepull(image) {
    const answer = await dialog({ title: "Pull an image in advance", action: "Pre-pull", body: [
      h("label", { class: "stacked" }, "Image", h("input", { name: "image", value: image, required: true })),
      h("label", { class: "stacked" }, "Labels of the workers, such as xcode=27 ssd=fast; empty: every worker",
        h("input", { name: "labels", pattern: LABELS, title: "name=value, and a space before the next one" }))] });
    if (!answer) return;
    const labels = Object.fromEntries(answer.get("labels").split(/[\s,]+/).filter(Boolean).map((pair) => pair.split(/=(.*)/s)));
    this.change((all) => [...all, { image: answer.get("image").trim(), labels }], "Workers look at it within a minute");
  }

  /** Change the list of what is pulled in advance: as it is now, since others may have changed it after this page read it. */
  async change(changed, done) {
    const run = async () => {
      // Settings that a PUT leaves out may get their defaults.
      const settings = await ask("/cluster-settings");
      await send("PUT", "/cluster-settings", { body: { ...settings, prepull: changed(settings.prepull || []) } });
    };
    if (await act(run, done)) this.load();
  }
}

function addImage(images, { name, sizeBytes, lastUsed }, worker) {
  const image = images.get(name) || { name, count: 0, workers: [], size: 0, lastUsed: "" };
  if (image.count++ < MAX_NAMED) image.workers.push(worker);
  image.size = Math.max(image.size, sizeBytes || 0);
  if ((lastUsed || "") > image.lastUsed) image.lastUsed = lastUsed;
  images.set(name, image);
}

// ---- page: history ----

// Entries of the history that are read at a time. To parse more would take longer than a frame.
const HISTORY_PIECE = 1000;

let endedVMs = { at: 0, list: null };

/** Return the VMs of the last week that have ended, the earliest first. Kept for a while. */
async function loadHistory() {
  if (Date.now() - endedVMs.at > 20 * SECOND) endedVMs = { at: Date.now(), list: await readHistory(7 * DAY) };
  return endedVMs.list;
}

/** Return the VMs that ended within the last `age` milliseconds, with `end` and the times `queue`, `boot` and `run` in milliseconds. */
async function readHistory(age) {
  const found = new Map();
  let since = new Date(serverTime() - age).toISOString(), limit = HISTORY_PIECE;
  for (;;) {
    const piece = await ask(`/history?limit=${limit}&since=${encodeURIComponent(since)}`);
    for (const { metadata, ...vm } of piece) {
      const [created, assigned, started, end] = [vm.createdAt, vm.assignedAt, vm.startedAt, vm.endedAt].map((time) => Date.parse(time));
      found.set(vm.uid, { ...vm, end, queue: assigned - created, boot: started - assigned, run: end - started });
    }
    if (piece.length < limit) return [...found.values()];
    // The next piece begins with the VMs that ended at the same time as the last one of this piece.
    if (piece.at(-1).endedAt === since) limit *= 2;
    since = piece.at(-1).endedAt;
  }
}

function quantile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** Return one of the times of VMs, without those of VMs that did not come so far. */
const timesOf = (vms, name) => vms.map((vm) => vm[name]).filter((time) => !Number.isNaN(time));

function summary(vms) {
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
  return { failed: mean(vms.map((vm) => Number(vm.status === "failed"))), boot: mean(timesOf(vms, "boot")), run: mean(timesOf(vms, "run")) };
}

class HistoryPage {
  title = "History";

  mount(main) {
    this.hours = h("select", { on: { change: () => this.draw() } }, [[24, "24 hours"], [72, "3 days"], [168, "7 days"]].map(([value, text]) => h("option", { value }, text)));
    this.body = h("div", { class: "columns thirds" }, empty("Loading…"));
    main.append(titleBar("History", h("label", {}, "Last", this.hours)), this.body);
  }

  async load() {
    this.vms = (await readFor(this.body, loadHistory)) || this.vms;
    if (this.vms) this.draw();
  }

  draw() {
    const hours = Number(this.hours.value), width = hours / 24, now = serverTime();
    const begin = now - hours * HOUR;
    const vms = (this.vms || []).filter((vm) => vm.end > begin);
    const slots = Array.from({ length: 24 }, () => []);
    for (const vm of vms) slots[Math.min(23, Math.floor((vm.end - begin) / (width * HOUR)))].push(vm);
    const rate = (list) => list.length / width;
    const times = (name, share) => slots.map((list) => quantile(timesOf(list, name), share));
    refill(this.body,
      panel("VMs an hour", barPlot("VMs that ended, an hour", slots.map(rate), slots.map((list) => rate(list.filter((vm) => vm.status === "failed"))), hours), legend("ended", "of these failed", "squares")),
      panel("Time in the queue", linePlot("Time in the queue", times("queue", 0.5), times("queue", 0.9), hours), legend("median", "90th percentile")),
      panel("Time to boot", linePlot("Time from the assignment until the VM runs", times("boot", 0.5), times("boot", 0.9), hours), legend("median", "90th percentile")),
      ...[["image", "image"], ["worker", "worker"], ["createdBy", "owner"]].map(([key, name]) => panel(`Failures by ${name}`, failureTable(vms, key, name))));
  }
}

function legend(a, b, shape = "") {
  return h("p", { class: `legend ${shape}` }, h("span", {}, h("i"), a), h("span", {}, h("i", { class: "b" }), b));
}

const PLOT = { width: 400, height: 150, left: 44, top: 8, floor: 132 };

function plotFrame(label, most, format, hours) {
  const { width, height, left, top, floor } = PLOT;
  const text = (x, y, value, anchor) => svg("text", { x, y, "text-anchor": anchor }, value);
  return svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}: at most ${format(most)}` },
    svg("path", { class: "axis", d: `M${left} ${floor}H${width}M${left} ${top}H${width}`, fill: "none" }),
    text(left - 6, 12, format(most), "end"), text(left - 6, floor, "0", "end"), text(left, height - 2, hours > 24 ? `${hours / 24} d ago` : `${hours} h ago`, "start"), text(width, height - 2, "now", "end"));
}

const plotX = (index) => PLOT.left + ((PLOT.width - PLOT.left) * index) / 24;
const plotY = (value, most) => PLOT.floor - ((PLOT.floor - PLOT.top) * value) / most;
const oneDecimal = (value) => String(Math.round(10 * value) / 10);

function barPlot(label, values, bad, hours) {
  const most = Math.max(1, ...values), plot = plotFrame(label, most, oneDecimal, hours);
  const bars = (list, name) => list.forEach((value, index) => {
    const y = plotY(value, most);
    if (value) plot.append(svg("rect", { class: name, x: plotX(index) + 2, y, width: plotX(1) - plotX(0) - 4, height: PLOT.floor - y }, svg("title", {}, oneDecimal(value))));
  });
  bars(values, "bars");
  bars(bad, "bad");
  return plot;
}

function linePlot(label, median, high, hours) {
  const most = Math.max(1000, ...median, ...high), plot = plotFrame(label, most, duration, hours);
  for (const [values, name] of [[high, "b"], [median, "a"]]) {
    const points = values.map((value, index) => (value === null ? null : [plotX(index + 0.5), plotY(value, most), value])).filter(Boolean);
    if (points.length) plot.append(svg("path", { class: name, d: `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}` }));
    for (const [cx, cy, value] of points) plot.append(svg("circle", { class: name, cx, cy, r: 2 }, svg("title", {}, duration(value))));
  }
  return plot;
}

function failureTable(vms, key, name) {
  const groups = [...Map.groupBy(vms, (vm) => vm[key] || "–")].map(([value, list]) => ({ value, all: list.length, failed: list.filter((vm) => vm.status === "failed").length }));
  const rows = groups.filter((group) => group.failed).sort((a, b) => b.failed - a.failed).slice(0, 10).map(({ value, all, failed }) =>
    h("tr", {}, h("td", {}, value), h("td", {}, String(failed)), h("td", {}, `${Math.round((100 * failed) / all)} %`), h("td", {}, bar(failed / all, "share that failed", true))));
  return rows.length ? table(`Failures by ${name}`, [name, "failed", "of its VMs", ""], rows) : empty(vms.length ? "None." : "No VM has ended in this time.");
}

// ---- page: API ----

class APIPage {
  title = "API";

  mount(main) {
    this.body = h("div", { class: "stack" }, empty("Loading…"));
    this.search = h("input", { type: "search", placeholder: "Search ( / )", "aria-label": "Search the API", on: { input: () => this.draw() } });
    main.append(titleBar("API", h("a", { class: "button", href: `${BASE}/v1/openapi.json` }, "openapi.json")), h("div", { class: "tools" }, this.search), this.body);
  }

  async load() {
    // To draw it again would close the operations that are open.
    if (this.document) return;
    this.document = await readFor(this.body, () => ask("/openapi.json"));
    if (this.document) this.draw();
  }

  draw() {
    const wanted = this.search.value.toLowerCase(), groups = new Map();
    for (const [path, item] of Object.entries(this.document?.paths || {})) {
      for (const [method, operation] of Object.entries(item)) {
        if (method === "parameters" || !`${method} ${path} ${operation.summary} ${operation.description}`.toLowerCase().includes(wanted)) continue;
        const first = path.split("/")[1], group = ["", "openapi.json", "health", "metrics"].includes(first) ? "controller" : first;
        if (!groups.has(group)) groups.set(group, []);
        groups.get(group).push(operationItem(method.toUpperCase(), path, operation));
      }
    }
    refill(this.body, ...[...groups].map(([group, items]) => panel(group, ...items)));
  }
}

function operationItem(method, path, operation) {
  const parameters = (operation.parameters || []).filter((one) => one.in === "query");
  const rows = parameters.map((one) => h("tr", {}, h("td", { class: "mono" }, one.name), h("td", {}, one.description)));
  const body = operation.requestBody ? ` -H 'Content-Type: application/json' -d '${JSON.stringify(operation.requestBody.content["application/json"].example)}'` : "";
  const query = parameters.filter((one) => one.required).map((one, index) => `${index ? "&" : "?"}${one.name}=${one.name.toUpperCase()}`).join("");
  const verb = method === "GET" ? "" : ` -X ${method}`;
  const account = needsCredentials ? ` -u ${session.account}:$TOKEN` : "";
  const line = `curl${path === "/watch" ? " -N" : ""}${verb}${account} '${location.origin}${BASE}/v1${path.replace(/\{(\w+)\}/g, (_, word) => word.toUpperCase())}${query}'${body}`;
  const answers = Object.entries(operation.responses).map(([status, one]) => h("tr", {}, h("td", {}, status), h("td", {}, one.description)));
  return h("details", { class: "op" }, h("summary", {}, h("span", { class: `method ${method}` }, method), h("code", {}, path), h("p", {}, operation.summary)),
    h("div", { class: "inside" }, operation.responses["101"] ? empty("A WebSocket, which curl does not speak.") : copyLine(line, `${method} ${path}`), rows.length > 0 && table("Parameters", ["Parameter", "Meaning"], rows), table("Answers", ["Status", "Meaning"], answers)));
}

// ---- the frame ----

const PAGES = { __proto__: null, fleet: FleetPage, vms: VMsPage, images: ImagesPage, history: HistoryPage, api: APIPage, worker: WorkerPage, vm: VMPage };
const NAVIGATION = [["fleet", "Fleet"], ["vms", "VMs"], ["images", "Images"], ["history", "History"], ["api", "API"]];
const KEYS = [["/", "search"], ["j", "next"], ["k", "the one before"], ["Enter", "open"], ["?", "these keys"]];

// Milliseconds after which drawing lets the browser paint.
const PIECE = 2;

class Frame {
  page = null;
  isScheduled = false;
  later = new Set();

  /** Draw what has changed, before the next frame that the browser paints. */
  schedule(draw = null) {
    if (draw) this.later.add(draw);
    if (this.isScheduled) return;
    this.isScheduled = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.isScheduled = false;
    const changed = fleet.takeChanges(), later = this.later;
    this.later = new Set();
    if (changed.all || changed.vms.size || changed.workers.size) this.page?.update?.(changed);
    // The rest goes on in the next frame.
    const began = performance.now();
    for (const draw of later) {
      if (performance.now() - began > PIECE) this.schedule(draw);
      else draw();
    }
  }

  route() {
    const [path, query] = location.hash.slice(2).split("?");
    const [wanted, name] = path.split("/").map(decoded);
    const kind = wanted in PAGES ? wanted : "fleet";
    this.leave();
    this.later = new Set();
    const main = byId("main"), isFirst = document.activeElement === document.body;
    main.replaceChildren();
    this.page = new PAGES[kind](name, new URLSearchParams(query));
    this.page.mount(main);
    this.page.load?.();
    fleet.changed.all = true;
    document.title = `${this.page.title} · Orchard`;
    main.setAttribute("aria-label", this.page.title);
    const current = { worker: "fleet", vm: "vms" }[kind] || kind;
    for (const link of byId("nav").children) {
      if (link.dataset.page === current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    scrollTo(0, 0);
    // A screen reader then says the name of the page, and Tab leads to its first control.
    if (!isFirst) main.focus({ preventScroll: true });
    // Now, since the browser might paint the empty page before the next frame.
    this.draw();
  }

  show() {
    byId("nav").replaceChildren(...NAVIGATION.map(([page, title]) => h("a", { href: `#/${page}`, "data-page": page }, title)));
    const signOutButton = needsCredentials ? button("Sign out", () => signOut(), { class: "quiet" }) : "";
    byId("account").replaceChildren(session.account, signOutButton);
    byId("top").hidden = false;
    setText(byId("connection"), "Connecting…");
    this.route();
  }

  hide() {
    this.leave();
    byId("top").hidden = true;
    document.body.classList.remove("stale");
  }

  /** Leave the page that is shown, and its dialogs. */
  leave() {
    this.page?.unmount?.();
    this.page = null;
    for (const open of document.querySelectorAll("dialog")) open.close();
  }

  showConnection(isLive) {
    const place = byId("connection");
    document.body.classList.toggle("stale", !isLive);
    place.classList.toggle("lost", !isLive);
    place.replaceChildren(h("span", {}, isLive ? "Live" : `Connection lost at ${timeOfDay(new Date())}, trying again`));
  }

  say(text) {
    const notice = h("p", {}, text);
    byId("notices").append(notice);
    while (byId("notices").children.length > 4) byId("notices").firstChild.remove();
    setTimeout(() => notice.remove(), 7 * SECOND);
  }

  showKeys() {
    dialog({ title: "Keys", body: facts(KEYS.map(([key, text]) => [h("kbd", {}, key), text])) });
  }

  onKey(event) {
    const isTyping = event.target.matches?.("input:not([type=checkbox]), select");
    if (event.key === "Escape" && isTyping && !document.querySelector("dialog[open]")) byId("main").focus({ preventScroll: true });
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || !session.info) return;
    if (event.key === "?") this.showKeys();
    else if (event.key === "/") document.querySelector("main input[type=search]")?.focus();
    else if (event.key === "j" || event.key === "k") this.move(event.key === "j");
    else return;
    event.preventDefault();
  }

  /** Give the focus to the first link to a worker or VM after the control that has it, or to the last one before. */
  move(isForward) {
    const links = [...document.querySelectorAll("main [data-nav]")].filter((link) => link.offsetParent);
    const here = document.activeElement, isAt = (link, place) => here.compareDocumentPosition(link) & place;
    const next = isForward ? links.find((link) => isAt(link, Node.DOCUMENT_POSITION_FOLLOWING)) : links.findLast((link) => isAt(link, Node.DOCUMENT_POSITION_PRECEDING));
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
  }
}

const frame = new Frame();

// ---- the start ----

let stream = null;
// Tabs of one browser pass the sign-in on: each has a sessionStorage of its own.
const tabs = new BroadcastChannel(`orchard tabs ${BASE}`);

async function signIn(account, token) {
  const authorization = account || token ? authorizationOf(account, token) : "";
  const info = await ask("/controller/info", { authorization });
  if (!(info.roles || []).includes("compute:read")) throw new RequestError(403, `The account "${account}" lacks the role compute:read.`);
  beginSession(account, authorization, info);
  if (authorization) sessionStorage.setItem(STORED, JSON.stringify({ account, token }));
  stream = new Stream();
  frame.show();
  stream.start();
}

/** Sign out, and keep nothing of the cluster in memory. `isTold`: another tab did, and has told all tabs. */
function signOut({ isTold = false, message = "" } = {}) {
  sessionStorage.removeItem(STORED);
  if (!isTold) tabs.postMessage({ type: "out", account: session.account });
  beginSession();
  frame.hide();
  fleet.clear();
  endedVMs = { at: 0, list: null };
  showSignIn(message);
}

function showSignIn(message = "") {
  const account = h("input", { name: "account", autocomplete: "username", required: true, autocapitalize: "none", spellcheck: "false" });
  const token = h("input", { name: "token", type: "password", autocomplete: "current-password", required: true });
  const error = h("p", { class: "error", role: "alert" }, message);
  const submit = h("button", { class: "main" }, "Sign in");
  const onSubmit = async (event) => {
    event.preventDefault();
    submit.disabled = true;
    try {
      await signIn(account.value, token.value);
    } catch (problem) {
      setText(error, problem.status === 401 ? "The account is unknown, or the token is wrong." : reasonOf(problem));
      submit.disabled = false;
      token.select();
    }
  };
  const form = h("form", { on: { submit: onSubmit } }, h("h1", {}, "Orchard"), h("label", { class: "stacked" }, "Service account", account), h("label", { class: "stacked" }, "Token", token), error, submit);
  byId("main").replaceChildren(h("section", { class: "panel signin", "aria-label": "Sign in" }, form));
  document.title = "Sign in · Orchard";
  account.focus();
}

/** Return what another tab is signed in with, once one answers. */
function askTabs() {
  return new Promise((resolve) => {
    tabs.addEventListener("message", ({ data }) => data.type === "in" && resolve(data.stored));
    tabs.postMessage({ type: "who" });
  });
}

function onTab({ data }) {
  const stored = sessionStorage.getItem(STORED);
  if (data.type === "who" && stored && session.info) tabs.postMessage({ type: "in", stored });
  if (data.type === "out" && data.account === session.account && session.info) signOut({ isTold: true });
}

async function start() {
  tabs.addEventListener("message", onTab);
  addEventListener("hashchange", () => session.info && frame.route());
  addEventListener("keydown", (event) => frame.onKey(event));
  byId("help").addEventListener("click", () => frame.showKeys());
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
  });
  setInterval(tickTimes, SECOND);
  let stored = needsCredentials ? sessionStorage.getItem(STORED) : "{}";
  if (!stored) {
    // Until another tab answers, which may be busy, a person can sign in.
    const timer = setTimeout(showSignIn, 250);
    stored = await askTabs();
    clearTimeout(timer);
    if (stream) return;
  }
  const { account = "", token = "" } = JSON.parse(stored);
  for (;;) {
    try {
      return await signIn(account, token);
    } catch (problem) {
      // A person has used the form meanwhile.
      if (session.info) return;
      if (problem.status === 401 || problem.status === 403) return showSignIn(problem.status === 403 ? problem.message : "");
      setText(byId("main"), "The controller cannot be reached. Trying again.");
      await sleep(SECOND);
    }
  }
}

start();
