// Calls of the server. Addresses are relative to the page, so that it works behind a prefix.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: no answer at all
  }
}

/**
 * Call the server and return its JSON.
 *
 * @param {string} method
 * @param {string} path without a leading slash
 * @param {object | FormData} [body] an object is sent as JSON
 * @throws {ApiError} with the server's one line, or one that says why there is none
 */
export async function call(method, path, body) {
  const options = { method, headers: {} };
  if (body instanceof FormData) {
    options.body = body;
  } else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError("The server does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) {
    const message = answer?.error?.message ?? `The server answered ${response.status} to ${path}.`;
    throw new ApiError(message, response.status);
  }
  return answer;
}

/** Put fields into a form if a file is among them, else return them; empty ones are left out. */
export function requestBody(fields) {
  const present = Object.entries(fields).filter(([, value]) => value !== null && value !== "");
  if (!present.some(([, value]) => value instanceof Blob)) return Object.fromEntries(present);
  const form = new FormData();
  for (const [name, value] of present) form.append(name, value);
  return form;
}
