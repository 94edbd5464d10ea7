// The page: asks, stops, remembers.

import { ApiError, hasToken, models, useToken } from "./api.js";
import { show, showEnd, showProgress } from "./answer.js";
import { Images, thumbnail } from "./images.js";
import { Question } from "./question.js";
import { bytes, element, milliseconds, percent, the } from "./words.js";

// Answers keep their images, which are large.
const REMEMBERED = 12;
const AGAIN_MS = 3000;

const images = new Images(complain);
let served = [];
let asked = [];
let shown = null;
let running = null;

function complain(text) {
  the("trouble").textContent = text;
  the("trouble").hidden = !text;
}

function fail(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status !== 401) return complain(error.message);
  complain(hasToken() ? "The router does not know this token." : "The router wants a token before it answers.");
  the("entrance").hidden = false;
  the("token").focus();
}

/** Asks for the models until there is one, or until a token is missing. */
async function welcome() {
  try {
    served = await models();
    complain(served.length ? "" : "No model can be asked yet: the router waits for its workers.");
  } catch (error) {
    fail(error);
    if (error.status === 401) return;
  }
  if (!served.length) return void setTimeout(welcome, AGAIN_MS);
  the("model").replaceChildren(...served.map(({ id }) => new Option(id)));
  the("go").disabled = false;
  offer();
}

/** What the chosen model can do. */
function offer() {
  const model = served[the("model").selectedIndex];
  the("policy").replaceChildren(
    ...model.policies.map((name) => {
      const isDefault = name === model.default_policy;
      return new Option(isDefault ? `${name} (default)` : name, name, isDefault, isDefault);
    }),
  );
  the("retention").value = 100 * model.default_retention;
  showShare();
}

function showShare() {
  the("share").textContent = percent(the("retention").value / 100);
}

async function ask() {
  const settings = {
    model: the("model").value,
    policy: the("policy").value,
    retention: the("retention").value / 100,
    max_tokens: Number(the("most").value),
  };
  turn(new AbortController());
  complain("");
  await images.ready;
  const question = new Question(the("question").value.trim(), images.all, settings);
  remember(question);
  try {
    await question.run(running.signal, () => shown === question && showProgress(question));
  } catch (error) {
    fail(error);
  } finally {
    turn(null);
    if (shown === question) showEnd(question);
    list();
  }
}

function turn(controller) {
  running = controller;
  the("go").disabled = controller !== null;
  the("stop").disabled = controller === null;
}

function remember(question) {
  asked = [question, ...asked].slice(0, REMEMBERED);
  look(question);
  // on a phone it is below the form
  the("times").scrollIntoView({ block: "nearest" });
}

function look(question) {
  shown = question;
  show(question);
  list();
}

function list() {
  the("history").hidden = asked.length < 2;
  the("entries").replaceChildren(...asked.map(entry));
}

function entry(question) {
  const { images, settings, text, usage } = question;
  const figures = [settings.policy, percent(settings.retention), milliseconds(question.e2e())];
  if (usage?.kv.kept_bytes) figures.push(`${bytes(usage.kv.kept_bytes)} kept`);
  const button = element(
    "button",
    { type: "button", ariaCurrent: String(question === shown) },
    ...images.slice(0, 1).map(thumbnail),
    element(
      "span",
      {},
      element("b", { textContent: question.question }),
      element("span", { textContent: text || "–" }),
      element("small", { className: "quiet", textContent: figures.join(" · ") }),
    ),
  );
  button.addEventListener("click", () => {
    look(question);
    // the list is new, and the focus was on the old one
    the("entries").querySelector("[aria-current=true]").focus();
  });
  return element("li", {}, button);
}

the("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && served.length) ask();
});
the("entrance").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(the("token").value.trim());
  the("entrance").hidden = true;
  welcome();
});
the("question").addEventListener("keydown", (event) => {
  // not the Enter that ends a word of an input method
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    the("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
the("stop").addEventListener("click", () => running?.abort());
the("model").addEventListener("change", offer);
the("retention").addEventListener("input", showShare);
the("whole").addEventListener("change", (event) => the("stage").classList.toggle("whole", event.target.checked));
welcome();
