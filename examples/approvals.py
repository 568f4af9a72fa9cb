"""A page of your product where a person decides: letters that an agent drafts are sent only when somebody approved.

While a letter waits, for a minute or a month, its run holds no worker, no connection and no memory.
From the repository, with a server under way (python tidebase.py):

    python -m examples.approvals work                  # a worker; start as many as you like
    python -m uvicorn examples.approvals:app           # the product: http://127.0.0.1:8000
"""

import sys
from html import escape
from urllib.parse import parse_qs

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from tidebase import Tidebase, TidebaseError

tide = Tidebase()
app = FastAPI()


@tide.workflow("letter")
def letter(run, input):
    text = run.step("draft", lambda: f"Dear {input['to']},\nyour order is on its way.", input=input)
    decision = run.gate("approve-send", f"Send this to {input['to']}?", data={"text": text}, timeout_s=30 * 86_400)
    if not decision.approved:
        return {"sent": False, "by": decision.actor}
    run.step("send", lambda: print(f"sent to {input['to']}", flush=True), side_effects=["email"],
             idempotency_key=run.run_id)  # hand it to your mail provider: a repeated request sends no second letter
    return {"sent": True, "by": decision.actor}


def page(body: str) -> HTMLResponse:
    return HTMLResponse(f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Letters</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ padding: 1rem; border: 1px solid; border-radius: .5rem; white-space: pre-wrap }}</style>{body}</html>""")


def form(data: bytes) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(data.decode()).items()}


@app.get("/")
def letters():
    rows = "".join(f'<li><a href="/letters/{run["id"]}">to {escape(str(run["input"]["to"]))}</a>: {run["status"]}'
                   for run in tide.runs.list(workflow="letter"))
    return page(f'<h1>Letters</h1><form method="post" action="/letters"><label>To <input name="to" required></label> '
                f"<button>Draft a letter</button></form><ul>{rows}</ul>")


@app.post("/letters")
async def write(request: Request):
    to = form(await request.body()).get("to", "")
    run = tide.enqueue("letter", input={"to": to}, dedupe_key=f"letter-{to}")["run"]
    return RedirectResponse(f"/letters/{run['id']}", status_code=303)


def letter_of(run_id: str):
    """The run, and the gate that is pending, if one is."""
    try:
        detail = tide.runs.get(run_id, include=["run", "gates"])
    except TidebaseError as error:
        raise HTTPException(error.status or 503, "no such letter") from None
    return detail["run"], next((gate for gate in detail["gates"] if gate["status"] == "pending"), None)


@app.get("/letters/{run_id}")
def show(run_id: str):
    run, gate = letter_of(run_id)
    if gate is None:
        return page(f"<h1>Letter</h1><p>{run['status']}: {escape(str(run['result'] or 'nothing to decide yet'))}"
                    '<p><a href="">Look again</a> · <a href="/">All letters</a>')
    return page(f'<h1>{escape(gate["prompt"])}</h1><pre>{escape(gate["data"]["text"])}</pre><form method="post">'
                '<button name="decision" value="approved">Send it</button> '
                '<button name="decision" value="rejected">Do not</button></form>')


@app.post("/letters/{run_id}")
async def decide(run_id: str, request: Request):
    # Your own login says who this is and whether they may decide; the gate's token never leaves your server.
    _, gate = letter_of(run_id)
    if gate is not None:
        decision = form(await request.body()).get("decision", "rejected")
        try:
            tide.gates.resolve(run_id, gate["id"], token=gate["resolveToken"], decision=decision, actor="ada")
        except TidebaseError as error:
            if error.code != "gate_resolved":  # somebody else was faster, and exactly one decision counts
                raise
    return RedirectResponse(f"/letters/{run_id}", status_code=303)


if __name__ == "__main__" and sys.argv[1:] == ["work"]:
    tide.work()
