// What a person decides: a gate, or a step of which nobody knows whether it had its effect.

import { path, post } from "./api.js";
import { announce, el, field, setText, show, toast } from "./dom.js";

const ACTOR = "tidebase.actor";

/** The name under which decisions are recorded; kept in this browser, so that it is typed once. */
export function actorInput() {
  return el("input", { name: "actor", autocomplete: "name", maxlength: 200, value: localStorage.getItem(ACTOR) ?? "" });
}

const keepActor = (name) => (name ? localStorage.setItem(ACTOR, name) : localStorage.removeItem(ACTOR));

/** The text of a JSON input, as it was typed; null when it is empty. A text that is no JSON is refused by the form. */
export function jsonInput(name, attributes = {}) {
  const input = el("textarea", { name, spellcheck: "false", autocapitalize: "off", ...attributes, oninput: check });
  function check() {
    let fault = "";
    if (input.value.trim()) {
      try {
        JSON.parse(input.value);
      } catch (error) {
        fault = `This is not JSON: ${error.message}`;
      }
    }
    input.setCustomValidity(fault);
  }
  return input;
}

/** The body of a request whose payloads go out as they were typed: bodyOf({decision: "complete"}, {output: "1.10"}). */
export function bodyOf(fields, payloads = {}) {
  const parts = Object.entries(fields).filter(([, value]) => value !== undefined && value !== null && value !== "")
    .map(([name, value]) => `${JSON.stringify(name)}:${JSON.stringify(value)}`);
  for (const [name, text] of Object.entries(payloads)) {
    if (text?.trim()) parts.push(`${JSON.stringify(name)}:${text.trim()}`);
  }
  return `{${parts.join(",")}}`;
}

/** A form whose buttons send a decision. send(decision, form's values) does it; onDone(answer) is called after it. */
function decisionForm(content, buttons, send, onDone) {
  const fault = el("p.error-text", { role: "alert", hidden: true });
  const form = el("form.stack", { async onsubmit(event) {
    event.preventDefault();
    const decision = event.submitter?.value;
    if (!decision) return; // Enter in a field must not decide anything
    const values = Object.fromEntries(new FormData(form));
    keepActor(values.actor);
    for (const button of form.querySelectorAll("button")) button.disabled = true;
    try {
      const answer = await send(decision, values);
      announce("Decided");
      document.dispatchEvent(new CustomEvent("decided"));
      onDone(answer);
    } catch (error) {
      setText(fault, error.message);
      show(fault, true);
      for (const button of form.querySelectorAll("button")) button.disabled = false;
    }
  } }, content, fault, el("div.decide", buttons.map(({ value, word, kind, confirm }) =>
    el("button", { value, class: kind, title: confirm ?? null }, word))));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input")) event.preventDefault();
  });
  return form;
}

/** Approve or reject a gate, whose resolveToken is the credential. */
export function gateForm(gate, onDone, options = {}) {
  return decisionForm([
    el("div.fields",
      field("Your name", actorInput()),
      field("Note", el("input", { name: "note", maxlength: 2000 }), "goes with the decision as payload.note"),
      el("details.all", el("summary", "Answer with JSON"),
        field("Payload", jsonInput("payload", { rows: 5 }), "what the run gets as decision.payload; with it, the note is left out"))),
  ], [{ value: "approved", word: "Approve", kind: "primary" }, { value: "rejected", word: "Reject", kind: "danger" }],
  (decision, { actor, note, payload }) =>
    post(path`/runs/${gate.runId}/gates/${gate.id}/resolve`, bodyOf({ token: gate.resolveToken, decision, actor },
      { payload: payload || (note && JSON.stringify({ note })) }), options),
  onDone);
}

/** Decide a step that may have had its effect: run it again, take it as done, or fail it. */
export function reviewForm(runId, step, onDone) {
  return decisionForm([
    el("p", "Its worker was gone before an outcome was recorded. Look where its effect would show (the mail, the charge, "
      + "the row), then say what happened."),
    el("div.fields",
      field("Your name", actorInput()),
      field("Output, when it happened", jsonInput("output", { rows: 3, placeholder: "null" }), "JSON: what the step would have returned")),
  ], [{ value: "retry", word: "It did not happen: run it again" }, { value: "complete", word: "It happened: keep this output", kind: "primary" },
    { value: "fail", word: "Fail the run", kind: "danger" }],
  (decision, { actor, output }) =>
    post(path`/runs/${runId}/steps/${step.id}/review`,
      bodyOf({ decision, actor }, decision === "complete" ? { output: output.trim() || "null" } : {})),
  (answer) => { toast(`${step.name}: decided`); onDone(answer); });
}
