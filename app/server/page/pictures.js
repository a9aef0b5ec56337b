// Small pictures of the blocks that were on screen: what the block on screen now was made from.

import { PARTITIONS, describeReads } from "./charts.js";
import { element } from "./dom.js";

const WIDTH = 72; // pixels of a picture
const MOST_PICTURES = 1000;
const MOST_SHOWN = 24; // of a partition: full history has all that there was

/**
 * Show what a block reads in a strip, a picture per block.
 *
 * @param {HTMLElement} strip
 * @returns {{show: (block: object, video: HTMLVideoElement) => void, clear: () => void}} `show`
 *   takes the block that came on screen just now, with its partitions
 */
export function readPictures(strip) {
  const pictures = new Map(); // by block

  function show(block, video) {
    keep(block, video);
    const groups = PARTITIONS.filter((partition) => block[partition].length).map((partition) => {
      const latest = latestReads(block, partition);
      const items = latest.map((index) => makeItem(index, pictures.get(index)));
      const rest = block[partition].length - latest.length;
      const name = element("small", {}, rest ? `${partition}, and ${rest} before` : partition);
      const group = element("div", { className: partition }, ...items, name);
      group.style.setProperty("--count", items.length);
      return group;
    });
    const text = groups.length ? "made from" : "made from nothing: a scene begins";
    strip.replaceChildren(element("span", {}, text), ...groups);
    strip.hidden = false;
    strip.setAttribute("aria-label", describeReads(block));
  }

  function keep(block, video) {
    if (pictures.has(block.index)) return;
    const picture = document.createElement("canvas");
    picture.width = WIDTH;
    picture.height = Math.round((WIDTH * video.videoHeight) / video.videoWidth);
    picture.getContext("2d").drawImage(video, 0, 0, picture.width, picture.height);
    pictures.set(block.index, picture);
    if (pictures.size <= MOST_PICTURES) return;
    const needed = new Set(PARTITIONS.flatMap((partition) => latestReads(block, partition)));
    pictures.delete([...pictures.keys()].find((index) => !needed.has(index)));
  }

  function clear() {
    pictures.clear();
    strip.replaceChildren();
    strip.hidden = true;
  }

  return { show, clear };
}

const latestReads = (block, partition) => block[partition].slice(-MOST_SHOWN);

/** A block that was made before this page was open has no picture. */
function makeItem(index, picture) {
  const item = element("figure", {}, element("figcaption", {}, String(index)));
  item.title = `Block ${index}`;
  if (picture) item.prepend(picture);
  return item;
}
