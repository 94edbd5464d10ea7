// One answer on the page: its text, times, bytes, and what was kept.

import { attention, budget, shares } from "./kept.js";
import { drawImage, drawKept, layOut } from "./overlay.js";
import { bytes, element, milliseconds, percent, the } from "./words.js";

const STATES = { waiting: "Waiting for the first token …", answering: "Answering …", stopped: "Stopped.", failed: "Failed." };
// Characters of an answer that are set in large letters.
const SHORT = 160;
const WHOLE_IMAGE = [0, 0, 1, 1];

/** Shows all that is known of an answer. */
export function show(answer) {
  the("welcome").hidden = true;
  the("answer").hidden = false;
  the("asked").textContent = answer.question;
  showPictures(answer);
  showEnd(answer);
  showProgress(answer);
}

/** Shows what changes with every token. */
export function showProgress(answer) {
  the("text").textContent = answer.text;
  the("text").classList.toggle("open", answer.state === "answering");
  the("text").classList.toggle("long", answer.text.length > SHORT);
  the("state").textContent = answer.state === "done" ? ending(answer) : STATES[answer.state];
  the("ttft").textContent = milliseconds(answer.ttft());
  the("itl").textContent = milliseconds(answer.itl());
  the("e2e").textContent = milliseconds(answer.e2e());
  the("tokens").textContent = answer.usage?.completion_tokens ?? "–";
}

/** Shows what is known at the end. */
export function showEnd(answer) {
  showProgress(answer);
  showBytes(answer.usage?.kv);
  showKept(answer);
}

function ending({ reason, usage }) {
  const cut = reason === "length" ? "Cut at the most tokens that were allowed. " : "";
  const visual = usage.prompt_tokens_details.image_tokens;
  // the first tokens are the prefill worker's, and with a policy that looks ahead the first few
  const whole = usage.kv.full_bytes === null ? " The answer ended before its KV was handed over: nothing was dropped." : "";
  return `${cut}The prompt had ${usage.prompt_tokens} tokens, ${visual} of them visual.${whole}`;
}

function showBytes(kv) {
  the("bytes").hidden = !kv?.full_bytes;
  if (the("bytes").hidden) return;
  the("saved").textContent = `${percent(kv.saved_bytes / kv.full_bytes)} of the KV saved`;
  const way = { local: "handed over in one process", memory: "sent through shared memory", grpc: "sent over gRPC" };
  const sent = kv.transport ? (way[kv.transport] ?? `sent by ${kv.transport}`) : "not sent: the answer ended before";
  the("how").textContent = `${kv.policy}, ${sent}`;
  const rows = { Full: kv.full_bytes, Kept: kv.kept_bytes, Sent: kv.sent_bytes };
  the("bars").replaceChildren(
    ...Object.entries(rows).map(([name, size]) => {
      const bar = element("span", { className: `bar ${name.toLowerCase()}` });
      bar.style.setProperty("--share", (size ?? 0) / kv.full_bytes);
      const number = element("span", { textContent: size === null ? "–" : bytes(size) });
      return element("div", {}, element("dt", { textContent: name }), element("dd", {}, bar, number));
    }),
  );
}

function showPictures({ images }) {
  the("pictures").hidden = images.length === 0;
  the("legend").hidden = the("layers").hidden = the("overlaps").hidden = true;
  the("stage").replaceChildren(
    ...images.map(({ name, bitmap }) => {
      const seen = element("canvas", { className: "seen", role: "img", ariaLabel: name });
      drawImage(seen, bitmap, layOut(bitmap, WHOLE_IMAGE));
      return element("div", { className: "picture" }, seen);
    }),
  );
}

function showKept(answer) {
  if (!answer.kept) return;
  the("legend").hidden = !answer.kept.images.some((grid) => grid.rows);
  the("overlaps").hidden = answer.kept.images.every((grid) => grid.rows);
  the("layers").hidden = false;
  const budgets = [null, ...answer.kept.layers.keys()].map((layer) => ({ layer, ...budget(answer.kept, layer) }));
  const most = Math.max(...budgets.map(({ visual, text }) => visual + text));
  the("columns").replaceChildren(...budgets.map((each) => column(answer, each, most)));
  choose(answer, answer.layer);
}

/** A layer as a bar that can be chosen: a radio button, so that the arrow keys walk through the layers. */
function column(answer, { layer, visual, text }, most) {
  const radio = element("input", { type: "radio", name: "layer", checked: layer === answer.layer });
  radio.addEventListener("change", () => choose(answer, layer));
  const name = layer === null ? "All" : String(layer);
  radio.ariaLabel = layer === null ? "All layers" : `Layer ${layer}`;
  const bar = element("span", { className: "column" });
  for (const [kind, tokens] of Object.entries({ text, visual })) {
    bar.append(element("i", { className: kind }));
    bar.lastChild.style.setProperty("--share", tokens / most);
  }
  return element("label", {}, radio, bar, element("small", { textContent: name }));
}

function choose(answer, layer) {
  answer.layer = layer;
  const { visual, text } = budget(answer.kept, layer);
  const where = layer === null ? "All layers, on average" : `Layer ${layer}`;
  const kept = `${Math.round(visual)} visual and ${Math.round(text)} text tokens`;
  const of = `of ${answer.kept.layers[0].length}`;
  the("layer").textContent = `${where}: ${kept} ${of}, with ${percent(attention(answer.kept, layer))} of the attention.`;
  answer.kept.images.forEach((grid, number) => {
    if (grid.rows && answer.images[number]) drawOverlay(answer, number, grid);
  });
}

function drawOverlay(answer, number, grid) {
  const picture = the("stage").children[number];
  const { bitmap } = answer.images[number];
  const layout = layOut(bitmap, grid.box);
  const found = shares(answer.kept, grid, answer.layer);
  const over = picture.querySelector(".kept") ?? picture.appendChild(element("canvas", { className: "kept" }));
  // the paper may be larger than it was without a grid
  drawImage(picture.firstChild, bitmap, layout);
  drawKept(over, bitmap, layout, grid, found);
  const clear = found.filter((share) => share > 0).length;
  picture.firstChild.ariaLabel = `${answer.images[number].name}: ${clear} of ${found.length} patches kept`;
}
