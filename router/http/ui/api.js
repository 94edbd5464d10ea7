// The router's HTTP API, as any client sees it: docs/openai.md.

const TOKEN = "vlcache-token";
const BROKEN = "The connection ended before the answer did.";

/** An error in words for people; `status` is 0 where the router was not reached. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Keeps the token for as long as this tab is open. */
export function useToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** Whether one was given. */
export function hasToken() {
  return sessionStorage.getItem(TOKEN) !== null;
}

/** The models that can be asked now. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** The chunks of a streamed answer; ends early, and on all workers, when `signal` aborts. */
export async function* chat(request, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...request, ...options }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    // what fails after the first token has no status of its own
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ApiError(BROKEN, 0);
}

async function call(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (hasToken()) headers.authorization = `Bearer ${sessionStorage.getItem(TOKEN)}`;
  let response;
  try {
    // relative, so that a proxy may put the router behind a prefix
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The router cannot be reached.", 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const said = await response.json().catch(() => null);
  const wait = response.headers.get("retry-after");
  const message = said?.error?.message ?? `The router answered with status ${response.status}.`;
  return new ApiError(wait ? `${message} (try again in ${wait} s)` : message, response.status);
}

/** The data of server-sent events, one by one. */
async function* events(body) {
  let rest = "";
  // not `for await` over the stream, which Safari has not
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError(BROKEN, 0);
    });
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) yield piece.slice("data: ".length);
  }
}
