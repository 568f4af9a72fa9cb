"""An agent that waits for somebody else's webhook: it makes an invoice, waits days for the payment, and delivers.

The payment provider's webhook becomes a signal of the run. Sent twice, it counts once; sent before the agent asks for
it, it is kept; not sent in time, the agent goes another way.
From the repository, with a server under way (python tidebase.py):

    python -m examples.webhook_signal work             # a worker; start as many as you like
    PAYMENTS_SECRET=change-me python -m uvicorn examples.webhook_signal:app
    curl -s localhost:8000/orders -d '{"item": "tea"}' # {"runId": "run_..."}; the webhook is POST /payments, signed
"""

import hashlib
import hmac
import json
import os
import sys

from fastapi import FastAPI, HTTPException, Request

from tidebase import SignalTimeout, Tidebase, TidebaseError

tide = Tidebase()
app = FastAPI()


@tide.workflow("order")
def order(run, input):
    invoice = run.step("make invoice", lambda: {"reference": run.run_id, "cents": 500}, input=input)
    try:
        payment = run.wait_for_signal("paid", timeout_s=14 * 86_400)
    except SignalTimeout:
        return run.step("call it off", lambda: {"status": "never paid", "item": input["item"]})
    if payment["cents"] < invoice["cents"]:
        return run.step("give it back", lambda: {"status": "paid too little", "back": payment["cents"]})
    return run.step("deliver", lambda: {"status": "delivered", "item": input["item"]})


@app.post("/orders")
async def take_order(request: Request):
    run = tide.enqueue("order", input={"item": json.loads(await request.body())["item"]})["run"]
    return {"runId": run["id"]}


@app.get("/orders/{run_id}")
def look(run_id: str):
    run = tide.runs.get(run_id, include=["run"])["run"]
    return {"status": run["status"], "result": run["result"]}


@app.post("/payments")
async def payment_webhook(request: Request):
    raw = await request.body()
    expected = hmac.new(os.environ["PAYMENTS_SECRET"].encode(), raw, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, request.headers.get("x-signature", "")):
        raise HTTPException(401, "invalid signature")
    payment = json.loads(raw)
    try:
        tide.runs.signal(payment["reference"], "paid", {"cents": payment["cents"]})  # durable when it returns
    except TidebaseError as error:
        raise HTTPException(404 if error.status == 404 else 503, "try again") from None  # the provider will
    return {"accepted": True}


if __name__ == "__main__" and sys.argv[1:] == ["work"]:
    tide.work(concurrency=4)
