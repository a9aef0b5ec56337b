// Videos that are files: jobs with their progress, thumbnails, and a player.

import { call } from "./api.js";
import { act, byId, clock, element, plural, say, setFacts, setText } from "./dom.js";

const SHOWN = { queue: 4, cards: 12 }; // at first, of each list
const PAGE = 100; // videos of one request
const MOST_PAGES = 20;
const [BUSY_SECONDS, IDLE_SECONDS] = [1, 10]; // between two looks at the list

const isActive = (job) => job.status === "queued" || job.status === "in_progress";
const isCancelled = (job) => job.error?.code === "cancelled";

/** Order as a reader cares: what is being rendered, what waits in its order, then the newest. */
function compare(a, b) {
  const rank = (job) => (job.status === "in_progress" ? 0 : job.status === "queued" ? 1 : 2);
  if (rank(a) !== rank(b)) return rank(a) - rank(b);
  const newer = a.id < b.id ? 1 : -1;
  return rank(a) === 1 ? -newer : newer;
}

/** Show the jobs and keep them current. Returns a function that adds one, and says so in a line. */
export function showJobs() {
  const jobs = new Map();
  const cards = new Map();
  const shown = { ...SHOWN };
  let timer = 0;
  let isStale = true; // whether the whole list has to be read again

  async function refresh() {
    clearTimeout(timer);
    try {
      if (isStale) await readAll();
      else await readNews();
      say(byId("jobs-line"), "");
    } catch (error) {
      isStale = true;
      if (error.status) say(byId("jobs-line"), error.message, "error"); // else the stage tells
    }
    draw();
    const busy = [...jobs.values()].some(isActive);
    if (!document.hidden) timer = setTimeout(refresh, 1000 * (busy ? BUSY_SECONDS : IDLE_SECONDS));
  }

  async function readAll() {
    const list = [];
    for (let page = 0, after = ""; page < MOST_PAGES; page++) {
      const answer = await call("GET", `v1/videos?limit=${PAGE}${after}`);
      list.push(...answer.data);
      if (!answer.has_more) break;
      after = `&after=${answer.data.at(-1).id}`;
    }
    jobs.clear();
    for (const job of list) jobs.set(job.id, job);
    isStale = false;
  }

  // The newest videos, and those that are active: they may be older, as a queue is long.
  async function readNews() {
    const { data, has_more: more } = await call("GET", `v1/videos?limit=${PAGE}`);
    const listed = new Set(data.map((job) => job.id));
    const oldest = data.at(-1)?.id ?? "";
    for (const id of jobs.keys()) if (!listed.has(id) && (id > oldest || !more)) jobs.delete(id);
    for (const job of data) jobs.set(job.id, job);
    const unlisted = [...jobs.values()].filter((job) => !listed.has(job.id) && isActive(job));
    const [next] = unlisted.sort(compare);
    if (!next) return;
    try {
      jobs.set(next.id, await call("GET", `v1/videos/${next.id}`));
    } catch (error) {
      if (error.status !== 404) throw error;
      jobs.delete(next.id);
    }
  }

  function draw() {
    const sorted = [...jobs.values()].sort(compare);
    const active = sorted.filter(isActive);
    const drawn = new Set([
      ...drawList("queue", active, "waiting"),
      ...drawList("cards", sorted.slice(active.length), "videos"),
    ]);
    for (const [id, card] of cards) {
      if (drawn.has(id)) continue;
      card.root.remove();
      cards.delete(id);
    }
    const made = sorted.length - active.length;
    const counts = [made && `${made}`, active.length && `${active.length} to render`];
    setText(byId("jobs-figure"), counts.filter(Boolean).join(", "));
    byId("jobs").dataset.empty = String(!sorted.length);
  }

  function drawList(name, sorted, noun) {
    const list = byId(name);
    const visible = sorted.slice(0, shown[name]);
    visible.forEach((job, position) => {
      if (!cards.has(job.id)) cards.set(job.id, makeCard(job.id));
      const { root, update } = cards.get(job.id);
      update(job);
      const there = list.children[position] ?? null;
      if (there !== root) list.insertBefore(root, there);
    });
    const rest = sorted.length - visible.length;
    const more = byId(`more-${name}`);
    more.hidden = !rest;
    setText(more, `${rest} more ${noun}`);
    return visible.map((job) => job.id);
  }

  function showMore(name) {
    const list = byId(name);
    const first = list.children.length;
    shown[name] += 48;
    draw();
    list.children[first]?.querySelector("button:enabled, a").focus();
  }

  function add(job, line) {
    jobs.set(job.id, job);
    draw();
    cards.get(job.id)?.root.classList.add("new");
    say(line, isActive(job) ? `Queued as a video${place(job)}.` : "Saved as a video.");
    refresh();
  }

  function makeCard(id) {
    const base = `v1/videos/${encodeURIComponent(id)}`;
    let job = null;
    const picture = element("img", { alt: "", loading: "lazy", hidden: true });
    const play = element("button", { type: "button", className: "thumbnail" }, picture);
    const title = element("h3");
    const status = element("p", { className: "status" });
    const meter = element("progress", { max: 100, ariaLabel: "Progress" });
    const line = element("p", { className: "line" });
    line.setAttribute("role", "status");
    const button = (text, action) => {
      const made = element("button", { type: "button", className: "quiet" }, text);
      made.addEventListener("click", () => act(made, line, action));
      return made;
    };
    const download = element("a", { href: `${base}/content`, download: `${id}.mp4` }, "Download");
    const schedule = element("a", { href: `${base}/schedule`, download: `${id}.toml` }, "Schedule");
    const again = button("Render again", async () => {
      add(await call("POST", `${base}/remix`, {}), line);
    });
    const cancel = button("Cancel", async () => {
      jobs.set(id, await call("POST", `${base}/cancel`));
      draw();
    });
    const remove = button("Delete", async () => {
      await call("DELETE", base);
      jobs.delete(id);
      const next = root.nextElementSibling ?? root.previousElementSibling;
      draw();
      (next?.querySelector(".thumbnail") ?? byId("seconds")).focus(); // what had the focus is gone
    });
    const buttons = [download, schedule, again, cancel, remove];
    const actions = element("p", { className: "actions" }, ...buttons);
    const text = element("div", {}, title, status, meter, line, actions);
    const root = element("li", { className: "card" }, play, text);
    play.addEventListener("click", () => playJob(job, base));

    function update(current) {
      if (JSON.stringify(job) === JSON.stringify(current)) return;
      job = current;
      const done = job.status === "completed";
      root.dataset.status = isCancelled(job) ? "cancelled" : job.status;
      setText(title, job.prompt);
      title.title = job.prompt;
      setText(status, describe(job));
      meter.hidden = !isActive(job);
      meter.value = job.progress;
      download.hidden = !done;
      remove.hidden = isActive(job);
      cancel.hidden = !isActive(job);
      play.disabled = !done;
      play.setAttribute("aria-label", `${done ? "Play" : "No video of"} “${job.prompt}”`);
      if (done && picture.hidden) {
        picture.src = `${base}/content?variant=thumbnail`;
        picture.hidden = false;
      }
    }
    return { root, update };
  }

  for (const name of Object.keys(SHOWN)) {
    byId(`more-${name}`).addEventListener("click", () => showMore(name));
  }
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  byId("player").addEventListener("close", () => byId("player-video").removeAttribute("src"));
  refresh();
  return add;
}

function describe(job) {
  const length = `${clock(Number(job.seconds), Number(job.seconds) % 1 ? 1 : 0)}`;
  if (job.status === "queued") return `${length} · waits${place(job)}`;
  if (job.status === "in_progress") return `${length} · ${job.progress}%`;
  if (isCancelled(job)) return `${length} · cancelled`;
  if (job.status === "failed") return `${length} · failed: ${job.error.message}`;
  const switches = job.schedule.length - 1;
  const kind = job.recorded ? " · recorded live" : "";
  return `${length}${kind}${switches ? ` · ${plural(switches, "switch", "switches")}` : ""}`;
}

function place({ queue_position: position }) {
  if (!position) return "";
  return position === 1 ? ", next" : `, number ${position}`;
}

function playJob(job, base) {
  const video = byId("player-video");
  setText(byId("player-title"), job.prompt);
  video.src = `${base}/content`;
  const steps = job.schedule.slice(1).map((step) => `${clock(step.time, 1)} ${step.prompt}`);
  setFacts(byId("player-facts"), [
    ["Length", `${clock(Number(job.seconds), 1)}, ${job.size}`],
    ["Seed", String(job.seed)],
    ["Policy", job.policy ?? "the model's own"],
    ...(steps.length ? [["Then", steps.join(" · ")]] : []),
  ]);
  byId("player").showModal();
  video.play().catch(() => {});
}
