// Charts of the blocks that were made: time per block, what each block read; and the memory plan.

import { bytes, duration, element, setText } from "./dom.js";

const FEWEST_BLOCKS = 24; // that a chart has room for
export const PARTITIONS = ["sink", "mid", "recent"];

/**
 * Make a chart on a canvas that follows its size, the color scheme and the block looked at.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {HTMLElement} readout says what the block looked at has; the latest, if none is
 * @param {(context: CanvasRenderingContext2D, size: object, blocks: object[],
 *   chosen: object | null) => ((block: object) => number)} draw returns where a block is across
 * @param {(block: object) => string} describe
 * @returns {(blocks: object[]) => void} draws other blocks
 */
function blockChart(canvas, readout, draw, describe) {
  let blocks = [];
  let chosen = null; // index of the block that is looked at
  let across = () => 0;
  let due = false;

  function redraw() {
    due = false;
    const { width, height } = canvas.getBoundingClientRect();
    if (!width) return;
    const scale = devicePixelRatio;
    const pixels = [Math.round(width * scale), Math.round(height * scale)];
    if (pixels.join() !== [canvas.width, canvas.height].join()) {
      [canvas.width, canvas.height] = pixels;
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const block = blocks.find(({ index }) => index === chosen) ?? null;
    if (!block) chosen = null;
    across = draw(context, { width, height }, blocks, block);
    const described = block ?? blocks.at(-1);
    const text = described ? describe(described) : canvas.dataset.empty;
    setText(readout, text);
    canvas.setAttribute("aria-label", `${canvas.dataset.name}. ${text}`);
  }

  function request() {
    if (!due) requestAnimationFrame(redraw);
    due = true;
  }

  function choose(index) {
    chosen = index;
    request();
  }

  canvas.dataset.name = canvas.getAttribute("aria-label");
  canvas.addEventListener("pointermove", (event) => {
    const x = event.clientX - canvas.getBoundingClientRect().left;
    const distance = (block) => Math.abs(across(block) - x);
    const near = blocks.reduce((a, b) => (a && distance(a) < distance(b) ? a : b), null);
    if (near) choose(near.index);
  });
  canvas.addEventListener("pointerleave", () => choose(null));
  canvas.addEventListener("blur", () => choose(null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !blocks.length) return;
    event.preventDefault();
    const latest = blocks.at(-1).index;
    choose(Math.min(Math.max((chosen ?? latest) + step, blocks[0].index), latest));
  });
  new ResizeObserver(request).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", request);
  return (others) => {
    blocks = others;
    request();
  };
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);

/** Blocks that a chart spans, whose newest is at the right end once there is no more room. */
function span(blocks) {
  const first = blocks[0]?.index ?? 0;
  const last = blocks.at(-1)?.index ?? 0;
  return { first, count: Math.max(FEWEST_BLOCKS, last - first + 1) };
}

function drawSwitches(context, blocks, left, step, height) {
  context.fillStyle = color("faint");
  for (const { index, switch: change } of blocks) {
    if (change && index) {
      const x = left(index);
      context.globalAlpha = 0.45;
      context.fillRect(x - 0.5, 0, 1, height);
      context.globalAlpha = 1;
      context.beginPath();
      context.moveTo(x - 4, 0);
      context.lineTo(x + 4, 0);
      context.lineTo(x, 5);
      context.fill();
    }
  }
}

/** Chart the time per block against the time that a block plays, which `playing()` returns. */
export function speedChart(canvas, readout, playing) {
  return blockChart(
    canvas,
    readout,
    (context, { width, height }, blocks, chosen) => {
      const { first, count } = span(blocks);
      const [top, base] = [8, height - 1];
      const step = width / count;
      const left = (index) => (index - first) * step;
      const times = blocks.map((block) => block.seconds + block.encode_seconds);
      times.sort((a, b) => a - b);
      const longest = times[Math.floor(times.length * 0.98)] ?? 0; // a slow block hides no other
      const most = Math.max(playing() * 1.15, Math.min(longest * 1.1, playing() * 20));
      const up = (seconds) => (Math.min(seconds, most) / most) * (base - top);
      const gap = step > 3 ? 1 : 0;
      for (const block of blocks) {
        context.globalAlpha = chosen && chosen !== block ? 0.45 : 1;
        context.fillStyle = color("mid");
        const tall = up(block.seconds);
        context.fillRect(left(block.index), base - tall, step - gap, tall);
        context.fillStyle = color("encode");
        const rest = Math.max(up(block.seconds + block.encode_seconds) - tall, 0);
        context.fillRect(left(block.index), base - tall - rest, step - gap, rest);
      }
      context.globalAlpha = 1;
      context.fillStyle = color("line");
      context.fillRect(0, base, width, 1);
      drawSwitches(context, blocks, left, step, base);
      const level = base - up(playing());
      context.strokeStyle = color("sink");
      context.lineWidth = 1.5;
      context.setLineDash([5, 4]);
      context.beginPath();
      context.moveTo(0, level);
      context.lineTo(width, level);
      context.stroke();
      context.setLineDash([]);
      context.font = `11px ${getComputedStyle(canvas).fontFamily}`;
      const label = `real time, ${duration(playing())}`;
      const wide = context.measureText(label).width;
      context.fillStyle = color("panel");
      context.fillRect(width - wide - 6, level + 3, wide + 6, 15);
      context.fillStyle = color("sink");
      context.fillText(label, width - wide - 3, level + 14);
      return (block) => left(block.index) + step / 2;
    },
    (block) => {
      const { index, seconds, encode_seconds: encoding } = block;
      const times = `${duration(seconds)}, and ${duration(encoding)} to encode`;
      return `Block ${index}: ${times}${describeSwitch(block)}`;
    },
  );
}

function describeSwitch({ index, switch: change }) {
  return change && index ? `; switched to “${shorten(change.prompt)}”` : "";
}

function shorten(text) {
  return text.length > 60 ? `${text.slice(0, 59)}…` : text;
}

/** Chart the blocks that each block read: across, the block that was made; down, what it read. */
export function readsChart(canvas, readout) {
  return blockChart(
    canvas,
    readout,
    (context, { width, height }, blocks, chosen) => {
      const { first, count } = span(blocks);
      const last = Math.max(blocks.at(-1)?.index ?? 0, FEWEST_BLOCKS - 1);
      const step = width / count;
      const down = height / (last + 1);
      const wide = step > 3 ? step - 1 : step + 0.5; // small ones join to a line
      const tall = Math.max(down - (down > 3 ? 1 : 0), 1.5);
      const left = (index) => (index - first) * step;
      context.fillStyle = color("diagonal"); // what is not made yet cannot be read
      context.beginPath();
      context.moveTo(left(Math.max(first, 0)), first * down);
      context.lineTo(width, Math.min((first + count) * down, height));
      context.lineTo(width, height);
      context.lineTo(0, height);
      context.lineTo(0, first * down);
      context.fill();
      for (const partition of PARTITIONS) {
        context.fillStyle = color(partition);
        for (const block of blocks) {
          context.globalAlpha = chosen && chosen !== block ? 0.4 : 1;
          for (const read of block[partition]) {
            context.fillRect(left(block.index), read * down, wide, tall);
          }
        }
      }
      context.globalAlpha = 1;
      drawSwitches(context, blocks, left, step, height);
      return (block) => left(block.index) + step / 2;
    },
    describeReads,
  );
}

export function describeReads(block) {
  const parts = PARTITIONS.filter((partition) => block[partition].length).map(
    (partition) => `${partition} ${block[partition].join(", ")}`,
  );
  return `Block ${block.index} reads ${parts.join("; ") || "nothing: a scene begins"}`;
}

const PARTS = 7; // of a memory bar that have a color of their own
const GROWING = /^archive/; // grows with the video: beside the bar, which is fixed from the start

/** Show the memory plan: for each place a stacked bar and its legend. */
export function showMemory(target, rows) {
  const drawn = JSON.stringify(rows);
  if (target.dataset.drawn === drawn) return;
  target.dataset.drawn = drawn;
  target.replaceChildren(
    ...["device", "host"].flatMap((place) =>
      showPlace(place, rows.filter((row) => row.where === place)),
    ),
    ...rows
      .filter((row) => GROWING.test(row.name))
      .map((row) => {
        const most = `${bytes(row.bytes)} of ${PLACES[row.where]}`;
        return element("p", { className: "hint" }, `The archive grows beside it, up to ${most}.`);
      }),
  );
}

const PLACES = { device: "GPU memory", host: "host memory" };

function showPlace(place, rows) {
  const fixed = rows.filter((row) => row.bytes && !GROWING.test(row.name));
  const sorted = fixed.sort((a, b) => b.bytes - a.bytes);
  if (!sorted.length) return [];
  const count = sorted.length > PARTS + 1 ? PARTS : sorted.length; // one alone is not summed up
  const parts = sorted.slice(0, count);
  const rest = sorted.slice(count);
  if (rest.length) parts.push({ name: `${rest.length} smaller ones`, bytes: sumBytes(rest) });
  const total = sumBytes(sorted);
  const title = `${bytes(total)} of ${PLACES[place]}`;
  const bar = element("div", { className: "bar", role: "img", ariaLabel: title });
  const legend = element("ul", { className: "parts" });
  let tone = 0;
  for (const { name, bytes: size } of parts) {
    const partition = PARTITIONS.find((each) => name.endsWith(`cache.${each}`));
    const kind = partition ?? `tone${tone++}`;
    const text = name.replaceAll(/[._]/g, " ");
    const part = element("span", { className: kind, title: `${text}: ${bytes(size)}` });
    part.style.flexGrow = String(size / total);
    bar.append(part);
    const label = element("span", { className: `key ${kind}` }, text);
    legend.append(element("li", {}, label, element("span", {}, bytes(size))));
  }
  return [element("h3", {}, title), bar, legend];
}

const sumBytes = (rows) => rows.reduce((sum, row) => sum + row.bytes, 0);
