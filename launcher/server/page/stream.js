// What the server sends back for a conversation: the events of a stream, or its refusal in its own sentence.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function readRefusal(response) {
  const body = await response.json().catch(() => null);
  const sentence = body?.error?.message ?? `The server answered with ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  return new ServerError(wait > 0 ? `${sentence} Try again in ${wait} s.` : sentence, response.status);
}

// The JSON of every event of a response, as it comes; ends at [DONE]. Throws where the stream ends before that.
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer did.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
