// The live stream: a WebSocket whose H.264 fragments go into a Media Source.

import { call } from "./api.js";

const PLAYED_SECONDS = 15; // of the video that stay in the buffer after they were shown
const LONGEST_QUEUE = 64; // fragments that wait for the buffer; older ones are dropped
const FASTEST = 8; // times of real time: a render that is watched may be faster than it plays
const WAITS_SECONDS = [0.5, 1, 2, 4, 8]; // before another attempt to connect

/**
 * Play fragments in a video element, near the latest one.
 *
 * @param {HTMLVideoElement} video
 * @param {{onUnsupported: (mime: string) => void, onJump: (seconds: number) => void,
 *   onBroken: () => void}} handlers
 */
function createPlayer(video, handlers) {
  let source = null;
  let buffer = null;
  let queue = [];
  let blockSeconds = 0.5; // that a block plays
  let speed = 1; // at which blocks come, in times of real time
  let latest = 0; // when one came, in seconds

  function begin(mime, header) {
    end();
    [speed, latest] = [1, 0];
    const Source = self.ManagedMediaSource ?? self.MediaSource; // the first is all that an iPhone has
    if (!Source?.isTypeSupported(mime)) return handlers.onUnsupported(mime);
    const opened = (source = new Source());
    queue = [header];
    video.disableRemotePlayback = true; // a managed source does not open otherwise
    const url = (video.src = URL.createObjectURL(opened));
    opened.addEventListener(
      "sourceopen",
      () => {
        URL.revokeObjectURL(url);
        if (opened !== source) return;
        buffer = opened.addSourceBuffer(mime);
        buffer.addEventListener("updateend", () => {
          follow();
          pump();
        });
        pump();
      },
      { once: true },
    );
    video.play().catch(() => {}); // the browser waits for a click, or another video began
  }

  function append(fragment, seconds) {
    const now = performance.now() / 1000;
    if (latest) speed += 0.2 * (Math.min(seconds / (now - latest), FASTEST) - speed);
    [latest, blockSeconds] = [now, seconds];
    if (!source) return;
    queue.push(fragment);
    if (queue.length > LONGEST_QUEUE) queue.splice(buffer ? 0 : 1, 1);
    pump();
  }

  function pump() {
    if (!buffer || buffer.updating || source.readyState !== "open") return;
    const kept = video.currentTime - PLAYED_SECONDS;
    if (video.buffered.length && video.buffered.start(0) < kept - PLAYED_SECONDS) {
      return buffer.remove(0, kept);
    }
    if (!queue.length) return;
    try {
      buffer.appendBuffer(queue[0]);
      queue.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") return handlers.onBroken();
      if (video.currentTime > 1) buffer.remove(0, video.currentTime - 0.5);
    }
  }

  // Fragments that were lost leave gaps, a tab in the background stops to play, and a model that is
  // slower than real time is shown slowed down: that looks better than to stand still after a block.
  function follow() {
    const { buffered, currentTime } = video;
    if (!buffered.length) return;
    const start = buffered.start(buffered.length - 1);
    const end = buffered.end(buffered.length - 1);
    const ahead = end - currentTime;
    const lags = ahead > Math.max(2, 5 * blockSeconds);
    const isInGap = currentTime < start && video.readyState < video.HAVE_FUTURE_DATA;
    if (lags || isInGap) {
      if (lags && video.played.length) handlers.onJump(ahead);
      video.currentTime = Math.max(start + 1e-3, end - 2 * blockSeconds);
    }
    const hurries = ahead > 3 * blockSeconds;
    const slow = Math.min(1, Math.max(0.1, (speed * ahead) / blockSeconds));
    video.playbackRate = hurries ? Math.max(1, speed) + 0.1 : slow;
    if (video.paused) video.play().catch(() => {});
  }

  function end() {
    if (!source) return;
    source = buffer = null;
    queue = [];
    video.removeAttribute("src");
    video.load();
  }

  video.addEventListener("waiting", follow);
  video.addEventListener("error", () => source && handlers.onBroken());
  document.addEventListener("visibilitychange", () => document.hidden || follow());
  return { begin, append, end };
}

/**
 * Connect to the live stream, and again whenever the connection is lost.
 *
 * @param {HTMLVideoElement} video
 * @param {{onState: (state: object) => void, onBlock: (block: object) => void,
 *   onHeader: (header: object) => void, isOver: () => boolean,
 *   onConnection: (status: "open" | "lost" | "refused" | "over", detail?: any) => void,
 *   onUnsupported: (mime: string) => void, onJump: (seconds: number) => void}} handlers
 *   of "lost" the detail is the seconds until the next attempt, of "refused" the server's reason;
 *   `isOver` tells whether a lost connection is the end
 * @returns {() => void} connects at once where an attempt is due later
 */
export function followStream(video, handlers) {
  const address = new URL("v1/live/stream", document.baseURI);
  address.protocol = address.protocol.replace("http", "ws");
  let attempts = 0;
  let timer = 0;
  let socket = null;
  let fps = 16;
  const player = createPlayer(video, { ...handlers, onBroken: () => socket?.close() });

  function connect() {
    clearTimeout(timer);
    timer = 0;
    let announced = null; // what the next binary message belongs to
    socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      attempts = 0;
      handlers.onConnection("open");
    };
    socket.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        if (announced.type === "header") player.begin(announced.mime, data);
        else player.append(data, announced.frames / fps);
        return;
      }
      const message = JSON.parse(data);
      if (message.type === "state") {
        fps = message.bundle.fps;
        if (!message.video) player.end();
        handlers.onState(message);
      } else {
        announced = message;
        if (message.type === "header") handlers.onHeader(message);
        else handlers.onBlock(message);
      }
    };
    socket.onclose = retry;
  }

  // A refused handshake looks like a dead server: a plain request tells them apart.
  async function retry() {
    const seconds = WAITS_SECONDS[Math.min(attempts++, WAITS_SECONDS.length - 1)];
    if (handlers.isOver()) return handlers.onConnection("over");
    const refusal = await call("GET", "v1/live").then(() => null, (error) => error);
    if ([401, 403, 421].includes(refusal?.status)) {
      return handlers.onConnection("refused", refusal.message);
    }
    handlers.onConnection("lost", seconds);
    timer = setTimeout(connect, seconds * 1000);
  }

  const connectNow = () => timer && connect();
  addEventListener("online", connectNow);
  connect();
  return connectNow;
}
