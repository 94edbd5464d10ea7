// One question and its answer: what was asked, what has come, and when.

import { chat } from "./api.js";
import { decode } from "./kept.js";

/** Fills itself while it runs; `state` is waiting, answering, done, stopped or failed. */
export class Question {
  constructor(question, images, settings) {
    Object.assign(this, { question, images, settings });
    this.text = "";
    this.state = "waiting";
    this.usage = this.kept = this.layer = null;
    this.began = performance.now();
    // moments of pieces of the answer, and its end
    this.pieces = [];
    this.ended = null;
  }

  /** Asks and calls `onToken` after every piece; an error that is not the reader's own stop is thrown. */
  async run(signal, onToken) {
    try {
      for await (const chunk of chat(this.request(), signal)) {
        this.add(chunk);
        onToken();
      }
      this.state = "done";
    } catch (error) {
      this.state = signal.aborted ? "stopped" : "failed";
      if (!signal.aborted) throw error;
    } finally {
      this.ended = performance.now();
    }
  }

  /** Time to first token, milliseconds. */
  ttft() {
    return this.pieces.length ? this.pieces[0] - this.began : null;
  }

  /** The gap between two tokens, median, milliseconds. */
  itl() {
    const gaps = this.pieces.slice(1).map((at, number) => at - this.pieces[number]);
    return gaps.length ? gaps.sort((a, b) => a - b)[gaps.length >> 1] : null;
  }

  /** From the question to the end of the answer, milliseconds. */
  e2e() {
    return this.ended === null ? null : this.ended - this.began;
  }

  request() {
    const parts = this.images.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } }));
    const content = [...parts, { type: "text", text: this.question }];
    return { ...this.settings, messages: [{ role: "user", content }], explain: true };
  }

  add({ choices, usage }) {
    for (const { delta, finish_reason } of choices) {
      this.state = "answering";
      this.pieces.push(performance.now());
      this.text += delta.content;
      this.reason = finish_reason;
    }
    if (usage) {
      this.usage = usage;
      this.kept = usage.kv.kept ? decode(usage.kv.kept) : null;
    }
  }
}
