// The picture or clip that a new video begins with: dropped, pasted or chosen, with a preview.

import { byId, element, say } from "./dom.js";

const isUsable = (item) => /^(image|video)\//.test(item.type);

/** Wire the start image; returns a function that returns its file, or null. */
export function startImage() {
  const preview = byId("start-preview");
  let start = null;

  function use(file) {
    if (start) URL.revokeObjectURL(preview.firstChild.src);
    start = file;
    byId("start-file").value = "";
    for (const id of ["start-preview", "start-fit-label", "start-remove"]) byId(id).hidden = !file;
    byId("start-drop").hidden = Boolean(file);
    preview.replaceChildren();
    if (!file) return;
    const properties = { src: URL.createObjectURL(file), title: file.name };
    const playing = { muted: true, autoplay: true, loop: true, playsInline: true };
    preview.append(
      file.type.startsWith("video/")
        ? element("video", { ...properties, ...playing })
        : element("img", { ...properties, alt: `Start image ${file.name}` }),
    );
  }

  function take(files) {
    const file = [...files].find(isUsable);
    const error = "A video begins with a picture or a clip, not with this file.";
    say(byId("fresh-line"), file ? "" : error, "error");
    if (file) use(file);
  }

  byId("start-file").addEventListener("change", ({ target: { files } }) => files.length && take(files));
  byId("start-remove").addEventListener("click", () => {
    use(null);
    byId("start-file").focus();
  });
  const bringsFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!bringsFiles(event)) return;
    event.preventDefault(); // else the browser opens the file in place of the page
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping"); // it left the window
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!bringsFiles(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files);
  });
  addEventListener("paste", ({ clipboardData }) => {
    if ([...clipboardData.files].some(isUsable)) take(clipboardData.files);
  });
  return () => start;
}
