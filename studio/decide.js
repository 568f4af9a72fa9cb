// What a person decides: a gate, or a step of which nobody knows whether it had its effect.

import { path, post } from "./api.js";
import { el, errorText, field, input, setText } from "./dom.js";

const ACTOR = "tidebase.actor";

/** The name under which decisions are recorded; kept in this browser, so that it is typed once. */
export const actor = () => localStorage.getItem(ACTOR) ?? "";
const actorField = () => field("Your name", input("actor", { autocomplete: "name", maxlength: 200, value: actor() }));

/** An input for JSON; what is not JSON is refused by its form. */
export const jsonInput = (name, attributes = {}) => el("textarea", {
	name, spellcheck: "false", autocapitalize: "off", rows: 4, ...attributes, oninput({ target }) {
		try {
			if (target.value.trim()) JSON.parse(target.value);
			target.setCustomValidity("");
		} catch (error) {
			target.setCustomValidity(`This is not JSON: ${error.message}`);
		}
	} });

/** The body of a request whose payloads go out as they were typed: bodyOf({decision: "complete"}, {output: "1.10"}). */
export function bodyOf(fields, payloads = {}) {
	const texts = { ...payloads };
	for (const [name, value] of Object.entries(fields)) texts[name] = (value ?? "") === "" ? null : JSON.stringify(value);
	const members = Object.entries(texts).filter(([, text]) => text?.trim());
	return `{${members.map(([name, text]) => `"${name}":${text}`).join(",")}}`;
}

/** A form whose buttons [value, word, class] send a decision with its values. Enter in a field decides nothing. */
function decisionForm(content, buttons, send, onDone) {
	const fault = errorText();
	const form = el("form.stack", {
		onkeydown: (event) => event.key === "Enter" && event.target.matches("input") && event.preventDefault(),
		async onsubmit(event) {
			event.preventDefault();
			const values = Object.fromEntries(new FormData(form));
			localStorage.setItem(ACTOR, values.actor);
			form.inert = true;
			try {
				await send(event.submitter.value, values);
				document.dispatchEvent(new CustomEvent("decided"));
				onDone();
			} catch (error) {
				setText(fault, error.message);
				form.inert = false;
			}
		},
	}, content, fault, el("div.decide", buttons.map(([value, word, kind]) => el(`button${kind}`, { value }, word))));
	return form;
}

/** Approve or reject a gate, whose resolveToken is the credential. */
export const gateForm = (gate, onDone, options = {}) => decisionForm(
	el("div.fields", actorField(),
		field("Note", input("note", { maxlength: 2000 }), "goes with the decision as payload.note"),
		el("details.all", el("summary", "Answer with JSON"),
			field("Payload", jsonInput("payload"), "what the run gets as the decision's payload, instead of the note"))),
	[["approved", "Approve", ".primary"], ["rejected", "Reject", ".danger"]],
	(decision, { actor: name, note, payload }) => post(path`/runs/${gate.runId}/gates/${gate.id}/resolve`,
		bodyOf({ token: gate.resolveToken, decision, actor: name },
			{ payload: payload || (note && JSON.stringify({ note })) }), options), onDone);

/** Decide a step that may have had its effect: run it again, take it as done, or fail it. */
export const reviewForm = (runId, step, onDone) => decisionForm(
	[el("p", "It was begun and did not complete, so it may have had its effect. Look where that would show (the mail, the"
		+ " charge, the row), then say what happened."),
	el("div.fields", actorField(), field("Output, when it happened", jsonInput("output", { rows: 2, placeholder: "null" }),
		"JSON: what the step would have returned"))],
	[["retry", "It did not happen: run it again", ""], ["complete", "It happened: keep this output", ".primary"],
		["fail", "Fail the step", ".danger"]],
	(decision, { actor: name, output }) => post(path`/runs/${runId}/steps/${step.id}/review`,
		bodyOf({ decision, actor: name }, decision === "complete" ? { output: output.trim() || "null" } : {})), onDone);
