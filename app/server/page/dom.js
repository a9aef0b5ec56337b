// Elements, texts of numbers, and actions with their error beside them.

export const byId = (id) => document.getElementById(id);

/** Make an element. Properties are set on it, children may be text; null children are left out. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Set a text only if it changed: a screen reader would repeat it, a selection would be lost. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Fill a description list with [name, text] pairs. */
export function setFacts(list, pairs) {
  const names = pairs.map(([name]) => name).join();
  if (list.dataset.names !== names) {
    list.dataset.names = names;
    list.replaceChildren(
      ...pairs.map(([name]) => element("div", {}, element("dt", {}, name), element("dd"))),
    );
  }
  pairs.forEach(([, text], index) => setText(list.children[index].lastChild, text));
}

/** 75.5 -> "1:15.5"; whole seconds without `digits`. */
export function clock(seconds, digits = 0) {
  const unit = 10 ** digits;
  const rounded = Math.floor(seconds * unit + 1e-6) / unit;
  const minutes = Math.floor(rounded / 60);
  const rest = (rounded % 60).toFixed(digits).padStart(digits ? digits + 3 : 2, "0");
  if (minutes < 60) return `${minutes}:${rest}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

/** 0.1442 -> "144 ms", 8.13 -> "8.1 s" */
export function duration(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(count, 1)) / 3), 4);
  const value = count / 1000 ** power;
  return `${value >= 100 || !power ? Math.round(value) : value.toPrecision(3)} ${units[power]}`;
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** Say something in a line beside what it is about. */
export function say(line, text, kind = "note") {
  line.dataset.kind = kind;
  setText(line, text);
}

/** Run an action of a button, which waits for it; its error is said in `line`. */
export async function act(button, line, action) {
  if (button.getAttribute("aria-busy") === "true") return undefined;
  say(line, "");
  button.setAttribute("aria-busy", "true");
  try {
    return await action();
  } catch (error) {
    say(line, error.message, "error");
    return undefined;
  } finally {
    button.removeAttribute("aria-busy");
  }
}
