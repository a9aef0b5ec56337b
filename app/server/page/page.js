// The page: what the server says goes into it, what people do goes to the server.

import { call, requestBody } from "./api.js";
import { readsChart, showMemory, speedChart } from "./charts.js";
import { act, byId, clock, duration, element, plural, say, setFacts, setText } from "./dom.js";
import { showJobs } from "./jobs.js";
import { readPictures } from "./pictures.js";
import { startImage } from "./start.js";
import { followStream } from "./stream.js";

const MOST_BLOCKS = 240; // that the charts show
const SPEED_BLOCKS = 20; // that the speed is the mean of
const NOTE_SECONDS = 5; // that a remark on the picture stays
const LIVE = ["running", "paused", "unwatched"];
const HISTORY_HINTS = {
  keep: "What was made stays as it is; the new prompt blends into it.",
  recompute: "The recent blocks are read as if the new prompt had made them.",
  cut: "A new scene begins: nothing of the past is read.",
};

let state = null; // the latest that the server sent
let blocks = []; // the latest of the video whose id is `blocksOf`
let blocksOf = null;
let shown = null; // index of the block that is on screen
let follows = null; // the block that a switch takes effect with, until it is made
let connection = { status: "connecting" };
let unsupported = null; // the type of video that this browser cannot play
const video = byId("picture");
const prompt = byId("prompt");
const drawSpeed = speedChart(byId("speed-chart"), byId("speed-readout"), playingSeconds);
const pictures = readPictures(byId("made-from"));
const drawReads = readsChart(byId("reads-chart"), byId("reads-readout"));
const startFile = startImage();
let addJob = () => {};

const isLive = () => LIVE.includes(state?.video?.state);

function playingSeconds() {
  return state ? state.bundle.block_frames / state.bundle.fps : 0.5;
}

// ---- what the server says

const connectNow = followStream(video, {
  onState(message) {
    const isFirst = !state;
    const [before, now] = [state, message].map((each) => JSON.stringify(each?.bundle));
    if (!isFirst && before !== now) return location.reload(); // another server is there
    state = message;
    if (isFirst) setUp();
    expectBlocksOf(message.video?.id ?? null);
    if (message.blocks) blocks = message.blocks;
    show();
  },
  onHeader({ id }) {
    unsupported = null;
    expectBlocksOf(id);
  },
  onBlock(block) {
    blocks = blocks.filter(({ index }) => index < block.index); // a viewer who comes gets one again
    blocks.push(block);
    if (blocks.length > MOST_BLOCKS) blocks.shift();
    if (follows !== null && block.index >= follows) {
      follows = null;
      say(byId("prompt-line"), "");
    }
    showBlocks();
  },
  onConnection(status, detail) {
    connection = { status, detail };
    showNotice();
  },
  isOver: () => Boolean(state) && !state.steerable && !isLive(), // a watched render ends its server
  onUnsupported(mime) {
    unsupported = mime;
    showNotice();
  },
  onJump(seconds) {
    if (!state.steerable) return; // a render is faster or slower than it plays
    say(byId("stage-line"), `Jumped ahead ${seconds.toFixed(1)} s, to what is made now.`);
    setTimeout(() => say(byId("stage-line"), ""), NOTE_SECONDS * 1000);
  },
});

/** A video's header may come before the state that has its id, or after it. */
function expectBlocksOf(id) {
  if (id === blocksOf) return;
  blocksOf = id;
  blocks = [];
  shown = null;
  pictures.clear();
  follows = null;
}

/** Tell the partitions apart: `full` has the sink blocks first. */
function withPartitions(block) {
  const { full, sinks, mid } = block;
  return { ...block, sink: full.slice(0, sinks), mid, recent: full.slice(sinks) };
}

/** Fill in what stays the same as long as the page is open. */
function setUp() {
  const { bundle, steerable } = state;
  const facts = [bundle.name, `${bundle.width}×${bundle.height}`, `${bundle.fps} frames/s`];
  setText(byId("model"), facts.join(" · "));
  document.body.classList.toggle("watching", !steerable);
  document.documentElement.style.setProperty("--aspect", bundle.width / bundle.height);
  const others = bundle.policies.filter((name) => name !== bundle.policy);
  byId("policy").replaceChildren(
    element("option", { value: "" }, bundle.policy), // the server's own: none is sent
    ...others.map((name) => element("option", { value: name }, name)),
  );
  chooseHistory(bundle.default_history);
  if (!steerable) return;
  showWords(bundle.words);
  addJob = showJobs();
  const isEmpty = !prompt.value && document.activeElement !== prompt; // nobody writes there yet
  if (isEmpty) prompt.value = state.video?.prompt ?? examplePrompt(bundle.words);
  fitPrompt();
}

function show() {
  const live = state.video;
  document.body.dataset.state = live?.state ?? "empty";
  const names = {
    running: "Live",
    paused: "Paused",
    unwatched: "Waits for a viewer",
    stopped: "Stopped",
    ended: "Ended",
    failed: "Failed",
  };
  setText(byId("state"), names[live?.state] ?? "Nothing is live");
  setText(byId("caption"), live?.prompt ?? "");
  const sign = live?.state === "running" ? "▶ " : "";
  document.title = live ? `${sign}${live.prompt} · PackForcing` : "PackForcing";
  for (const id of ["pause", "stop", "record"]) byId(id).disabled = !isLive();
  const isHeld = live?.state === "paused";
  setText(byId("pause").lastElementChild, isHeld ? "Proceed" : "Pause");
  byId("pause").classList.toggle("held", isHeld);
  const recording = Boolean(live?.recording);
  byId("record").setAttribute("aria-pressed", String(recording));
  setText(byId("begin"), isLive() ? "Begin anew" : "Begin");
  byId("reuse-seed").hidden = !live;
  setText(byId("reuse-seed"), live ? `use ${live.seed} again` : "");
  showGo();
  showMemory(byId("memory-bars"), state.memory);
  showSchedule(live);
  showBlocks();
}

function showBlocks() {
  const live = state?.video;
  const latest = blocks.at(-1);
  const recent = blocks.slice(-SPEED_BLOCKS);
  const played = recent.reduce((sum, block) => sum + block.frames, 0) / (state?.bundle.fps ?? 1);
  const took = recent.reduce((sum, block) => sum + block.seconds, 0);
  const speed = took ? `${(played / took).toFixed(1)}× real time` : "";
  setText(byId("speed-figure"), speed);
  byId("speed-figure").classList.toggle("slow", played < took);
  const frames = latest ? latest.first_frame + latest.frames : (live?.frames ?? 0);
  const seconds = frames / (state?.bundle.fps ?? 1);
  const facts = live
    ? [
        ["made", clock(seconds, 1)],
        ["seed", String(live.seed)],
      ]
    : [];
  if (live?.viewers > 1) facts.push(["viewers", String(live.viewers)]);
  if (live?.behind_seconds >= 0.1) facts.push(["behind", duration(live.behind_seconds)]);
  if (latest?.lost) facts.push(["lost here", plural(latest.lost, "block")]);
  setFacts(byId("facts"), facts);
  const recording = live?.recording;
  byId("badge").hidden = !recording;
  const recorded = recording ? Math.max(0, seconds - recording.since_seconds) : 0;
  setText(byId("badge"), recording ? `Recording ${clock(recorded)}` : "");
  const total = live?.blocks_total;
  byId("progress").hidden = !total;
  if (total) {
    const done = (latest?.index ?? -1) + 1;
    byId("progress").firstElementChild.value = done / total;
    const parts = [`${done} of ${plural(total, "block")}`];
    if (live.state === "running" && recent.length) {
      parts.push(`${clock(((total - done) * took) / recent.length)} to go`);
    }
    setText(byId("progress").lastElementChild, parts.join(" · "));
  }
  showNotice();
  drawSpeed(blocks);
  drawReads(blocks.map(withPartitions));
}

function showSchedule(live) {
  const steps = live?.schedule ?? [];
  byId("schedule-actions").hidden = !steps.length;
  setText(byId("schedule-figure"), steps.length > 1 ? plural(steps.length, "prompt") : "");
  const list = byId("switches");
  const shown = JSON.stringify(steps);
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(
    ...steps.map((step, index) => {
      const how = index ? [step.history, step.over > 1 ? `over ${step.over} blocks` : null] : [];
      const text = element("button", { type: "button", className: "quiet" }, step.prompt);
      text.title = "Edit this prompt";
      text.addEventListener("click", () => edit(step.prompt));
      return element(
        "li",
        {},
        element("time", {}, clock(step.time, 1)),
        text,
        element("small", {}, how.filter(Boolean).join(", ")),
      );
    }),
  );
  list.scrollTop = list.scrollHeight;
}

/** Say over the picture why there is none, and what to do. */
function showNotice() {
  const [title, text, action] = notice() ?? [];
  byId("notice").hidden = !title;
  setText(byId("notice-title"), title ?? "");
  setText(byId("notice-text"), text ?? "");
  byId("notice-action").hidden = !action;
  setText(byId("notice-action"), action ?? "");
  document.body.classList.toggle("offline", ["lost", "refused"].includes(connection.status));
}

function notice() {
  if (connection.status === "refused") return ["No access", connection.detail];
  if (connection.status === "lost") {
    const seconds = Math.round(connection.detail);
    const when = seconds > 1 ? `in ${seconds} s` : "at once";
    return ["Connection lost", `Another attempt follows ${when}.`, "Connect now"];
  }
  if (!state) return null;
  if (unsupported) {
    const address = new URL("v1/live/video", document.baseURI);
    const text = `It lacks ${unsupported}. Players such as ffplay and VLC open ${address}.`;
    return ["This browser cannot play the stream", text];
  }
  const live = state.video;
  if (!live) {
    return state.steerable
      ? ["Nothing is live yet", "Write what it should show, then begin."]
      : ["The render has not begun", "The picture appears as it is made."];
  }
  if (live.state === "failed") return ["The video failed", live.error];
  if (live.state === "running" && !blocks.length) return ["The first block is made now", ""];
  return null;
}

// ---- the prompt

const words = (text) => text.toLowerCase().match(/[^\W_]+/g) ?? [];

/** Offer the words that a model knows by kind; one replaces another of its kind in the prompt. */
function showWords(kinds) {
  byId("words").hidden = !kinds;
  for (const [kind, names] of Object.entries(kinds ?? {})) {
    const areColors = names.every((name) => CSS.supports("color", name));
    const row = element("div", {}, element("span", {}, kind));
    for (const name of names) {
      const chip = element("button", { type: "button", className: "chip" }, name);
      if (areColors) {
        const swatch = element("i");
        swatch.style.background = name;
        chip.prepend(swatch);
      }
      chip.addEventListener("click", (event) => {
        const other = words(prompt.value).find((word) => names.includes(word));
        prompt.value = other
          ? prompt.value.replace(new RegExp(`\\b${other}\\b`, "i"), name)
          : `${prompt.value.trimEnd()} ${name}`.trimStart();
        prompt.dispatchEvent(new Event("input"));
        const usesMouse = event.detail > 0 && matchMedia("(pointer: fine)").matches;
        if (usesMouse) prompt.focus(); // so that Enter switches
      });
      row.append(chip);
    }
    byId("words").append(row);
  }
}

/** A scene to begin with: another one each time the page opens. */
function examplePrompt(kinds) {
  if (!kinds) return "";
  const pick = (kind) => kinds[kind][Math.floor(Math.random() * kinds[kind].length)];
  return `a ${pick("color")} ${pick("shape")} over ${pick("ground")} ${pick("pattern")}`;
}

function edit(text) {
  prompt.value = text;
  prompt.dispatchEvent(new Event("input"));
  prompt.focus();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  const present = words(prompt.value);
  for (const chip of document.querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", String(present.includes(chip.textContent)));
  }
  showGo();
}

function showGo() {
  setText(byId("go"), isLive() ? "Switch" : "Begin");
  const isNew = !isLive() || prompt.value.trim() !== state.video.prompt;
  byId("go").classList.toggle("idle", !isNew);
}

const history = () => document.querySelector("[name=history]:checked").value;

function chooseHistory(name) {
  document.querySelector(`[name=history][value=${name}]`).checked = true;
  showHistory();
}

function showHistory() {
  setText(byId("history-hint"), HISTORY_HINTS[history()]);
  const isCut = history() === "cut";
  byId("over").disabled = isCut; // a cut leaves nothing to blend with
  byId("over-label").classList.toggle("off", isCut);
  setText(byId("over-label").lastElementChild, byId("over").value === "1" ? "block" : "blocks");
}

// ---- what people do

const post = (path, body) => call("POST", path, body);

function freshFields() {
  return { prompt: prompt.value, seed: byId("seed").value.trim(), policy: byId("policy").value,
    start_fit: startFile() ? byId("start-fit").value : null, input_reference: startFile() };
}

async function begin(button, line) {
  if (!byId("seed").reportValidity()) return;
  await act(button, line, () => post("v1/live", requestBody(freshFields())));
}

async function go() {
  if (!isLive()) return begin(byId("go"), byId("prompt-line"));
  if (!byId("over").reportValidity()) return;
  const how = { history: history(), over: history() === "cut" ? 1 : byId("over").valueAsNumber };
  const answer = await act(byId("go"), byId("prompt-line"), () =>
    post("v1/live/switch", { prompt: prompt.value, ...how }),
  );
  if (!answer) return;
  follows = answer.block;
  if (blocks.at(-1)?.index >= follows) follows = null;
  else say(byId("prompt-line"), `Block ${follows} is the first to follow it.`);
}

async function render(button, line) {
  if (!byId("seconds").reportValidity() || !byId("seed").reportValidity()) return;
  const fields = { ...freshFields(), model: state.bundle.name, seconds: byId("seconds").value };
  const job = await act(button, line, () => post("v1/videos", requestBody(fields)));
  if (job) addJob(job, line);
}

const transport = (id, action) =>
  byId(id).addEventListener("click", () => act(byId(id), byId("stage-line"), action));

transport("pause", () => post(`v1/live/${state.video.state === "paused" ? "proceed" : "pause"}`));
transport("stop", () => post("v1/live/stop"));
transport("record", async () => {
  if (!state.video.recording) return post("v1/live/record");
  addJob(await post("v1/live/record/stop"), byId("stage-line"));
});

byId("steer").addEventListener("submit", (event) => {
  event.preventDefault();
  go();
});
byId("begin").addEventListener("click", () => begin(byId("begin"), byId("fresh-line")));
byId("render").addEventListener("click", () => render(byId("render"), byId("fresh-line")));
byId("schedule-render").addEventListener("click", async () => {
  const line = byId("schedule-line");
  const job = await act(byId("schedule-render"), line, () => post("v1/live/render", {}));
  if (job) addJob(job, line);
});
byId("reuse-seed").addEventListener("click", () => {
  byId("seed").value = state.video.seed;
  byId("seed").focus();
});
byId("notice-action").addEventListener("click", connectNow);
byId("history").addEventListener("input", showHistory);
byId("fullscreen").addEventListener("click", toggleFullscreen);
byId("open-help").addEventListener("click", () => byId("help").showModal());
prompt.addEventListener("input", fitPrompt);
addEventListener("resize", fitPrompt);

function toggleFullscreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else byId("theater").requestFullscreen?.().catch(() => {});
}

// ---- keys

const singleKeys = byId("single-keys"); // can be turned off, for those who dictate
try {
  singleKeys.checked = localStorage.getItem("single-keys") !== "off";
  singleKeys.addEventListener("change", () => {
    localStorage.setItem("single-keys", singleKeys.checked ? "on" : "off");
  });
} catch {
  // a browser that stores nothing forgets the choice
}

const keys = {
  "/": () => prompt.focus(),
  " ": () => byId("pause").click(),
  r: () => byId("record").click(),
  s: () => byId("stop").click(),
  f: toggleFullscreen,
  "?": () => byId("help").showModal(),
};

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Escape") prompt.blur();
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (event.ctrlKey || event.metaKey) begin(byId("begin"), byId("prompt-line"));
  else go();
});

addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !singleKeys.checked) return;
  if (document.querySelector("dialog[open]") || target.matches("input, textarea, select")) return;
  if (key === " " && target.matches("button, a, video")) return;
  const action = keys[key.length === 1 ? key.toLowerCase() : key];
  if (!action || (!state?.steerable && key === "/")) return;
  event.preventDefault();
  action();
});

// ---- with each frame that is shown: the glow behind the picture, and what its block was made from

const GLOW_FRAMES = 4; // of the video for one of the glow: without a GPU it costs CPU time
const glow = byId("glow");
const glowContext = glow.getContext("2d");
const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
let frames = 0;

function onFrame(time, { mediaTime }) {
  if (!isStill && frames++ % GLOW_FRAMES === 0) {
    glowContext.drawImage(video, 0, 0, glow.width, glow.height);
  }
  const frame = Math.round(mediaTime * (state?.bundle.fps ?? 1));
  const block = blocks.findLast((each) => each.first_frame <= frame);
  if (block && block.index !== shown) {
    shown = block.index;
    pictures.show(withPartitions(block), video);
  }
  video.requestVideoFrameCallback(onFrame);
}

video.requestVideoFrameCallback?.(onFrame); // older browsers do without
