// Plays the videos of a `.player` in step: its button, its bar (a step is a frame) and its choice of
// a prompt, whose value lists a URL per video.
"use strict";
for (const player of document.querySelectorAll(".player")) {
  const videos = [...player.querySelectorAll("video")];
  const [prompts, button, bar, clock] = ["select", "button", "input", "output"]
    .map((name) => player.querySelector(name));
  const fps = Number(player.dataset.fps);
  let playing = false;

  const show = (frame) => {
    bar.value = frame;
    clock.value = `${(bar.value / fps).toFixed(1)} s of ${((Number(bar.max) + 1) / fps).toFixed(1)} s`;
  };

  // Half a frame later than it begins: a rounded time would show the one before.
  const seek = (frame) => {
    for (const video of videos) video.currentTime = (frame + 0.5) / fps;
    show(frame);
  };

  // Nobody runs ahead of the slowest: a little ahead is slower, far ahead waits. So a video that
  // stalls holds the others, and nothing jumps.
  const follow = () => {
    if (!playing) return;
    const playable = videos.filter((video) => !video.error);
    if (playable.every((video) => video.ended)) seek(0);
    const running = playable.filter((video) => !video.ended);
    const slowest = Math.min(...running.map((video) => video.currentTime));
    for (const video of running) {
      const ahead = video.currentTime - slowest;
      video.playbackRate = ahead < 0.01 ? 1 : ahead < 0.05 ? 0.8 : 0;
      if (video.paused) video.play().catch(() => {}); // a newer choice of a prompt interrupts it
    }
    if (running.length) show(Math.floor(slowest * fps));
    requestAnimationFrame(follow);
  };

  const toggle = () => {
    playing = !playing;
    button.textContent = playing ? "Pause" : "Play";
    for (const video of videos) video.pause();
    follow();
  };

  button.addEventListener("click", toggle);
  bar.addEventListener("input", () => seek(Number(bar.value)));
  prompts.addEventListener("change", () => {
    JSON.parse(prompts.value).forEach((url, number) => { videos[number].src = url; });
    show(0);
  });
  bar.addEventListener("keydown", (event) => {
    if (event.key !== " ") return;
    event.preventDefault();
    toggle();
  });
  for (const video of videos) {
    video.controls = false;
    video.addEventListener("click", toggle);
    video.addEventListener("error", () => video.parentElement.classList.add("missing"));
    video.addEventListener("loadeddata", () => video.parentElement.classList.remove("missing"));
  }
  player.querySelector(".controls").hidden = false;
  show(0);
}
