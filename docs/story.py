"""A month of a small company's agents, told to a server over HTTP: what screenshots of Studio show.

The database's clock is moved while it is told, so that a month takes seconds. Needs the address of the server and of
its database, which nobody else uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import urllib.error
import urllib.request
from typing import Any

import psycopg

LEASE_MS = 60_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


class Story:
    """Tells runs to a server, at any time of the database's clock."""

    def __init__(self, url: str, conninfo: str) -> None:
        self.url = url
        self.connection = psycopg.connect(conninfo, autocommit=True)
        self.random = random.Random(7)
        self.offset = 0

    # --- the clock

    def at(self, ms_from_now: float) -> None:
        """Set the clock to a moment from the real now; negative for the past."""
        self.offset = int(ms_from_now)
        self.connection.execute(  # as the tests do it
            "create or replace function tidebase.now() returns timestamptz language sql volatile as $$ select "
            f"date_trunc('milliseconds', clock_timestamp()) + interval '{self.offset} milliseconds' $$"
        )

    def wait(self, ms: float) -> None:
        self.at(self.offset + ms)

    # --- verbs

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json", **headers}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        return self.send("POST", path, {} if body is None else body, **headers)

    def enqueue(self, workflow: str, queue: str, **body: Any) -> str:
        return self.post(f"/queues/{queue}/enqueue", {"workflowName": workflow, **body})["run"]["id"]

    def claim(self, queue: str, owner: str) -> str:
        [run] = self.post("/queues/claim", {"queues": [queue], "leaseOwner": owner})["runs"]
        return run["id"]

    def begin_step(self, run: str, name: str, owner: str, input: Any = None, **options: Any) -> str:
        digest = hashlib.sha256(json.dumps(input, sort_keys=True).encode()).hexdigest()
        body = {"name": name, "inputHash": digest, "leaseOwner": owner, "input": input, "options": options}
        return self.post(f"/runs/{run}/steps/begin", body)["step"]["id"]

    def complete_step(self, run: str, step: str, owner: str, output: Any) -> None:
        self.post(f"/runs/{run}/steps/{step}/complete", {"leaseOwner": owner, "output": output})

    def step(
        self, run: str, name: str, owner: str, ms: float, output: Any = None, input: Any = None, **options: Any
    ) -> str:
        step = self.begin_step(run, name, owner, input, **options)
        self.wait(ms)
        self.complete_step(run, step, owner, output)
        return step

    def usage(self, run: str, step: str | None, model: str, tokens_in: int, tokens_out: int, cost: float) -> None:
        provider = model.split("-", 1)[0]
        self.post(
            f"/runs/{run}/usage",
            {
                **({"stepId": step} if step else {}),
                "provider": provider,
                "model": model,
                "inputTokens": tokens_in,
                "outputTokens": tokens_out,
                "costUsd": round(cost, 6),
            },
        )

    def state(self, run: str, value: Any, **about: Any) -> None:
        self.send("PUT", f"/runs/{run}/state", {"value": value, **about})

    # --- chapters

    def tell(self) -> dict[str, str]:
        """:returns: ids of the runs that have a part in the pictures."""
        for name, concurrency in (("agents", 4), ("mail", 2), ("sync", None), ("billing", 1)):
            self.send("PUT", f"/queues/{name}/config", {"concurrency": concurrency})
        self.month()
        self.day()
        ids = {
            "crash": self.crash(),
            "approval": self.approvals(),
            "review": self.ambiguous(),
            "failed": self.failure(),
        }
        self.schedules()
        self.waiting()
        ids["live"] = self.live()
        self.at(0)
        return ids

    def month(self) -> None:
        """Costs of the last 30 days."""
        for day in range(30, 0, -1):
            busy = 1.6 if day % 7 not in (1, 2) else 0.4
            for workflow, model, tokens in (
                ("research-report", "opal-4", 52_000),
                ("triage-ticket", "opal-4-mini", 9_000),
                ("weekly-digest", "quartz-2", 21_000),
            ):
                self.at(-day * DAY - self.random.randrange(HOUR))
                run = self.enqueue(
                    workflow, "agents", input={"day": day}, metadata={"customer": self.random.choice(CUSTOMERS)}
                )
                owner = f"worker-{self.random.randint(1, 3)}"
                self.claim("agents", owner)
                step = self.step(run, "draft", owner, self.random.randint(900, 9000), {"words": 900})
                spent = int(tokens * busy * self.random.uniform(0.5, 1.5))
                self.usage(
                    run,
                    step,
                    model,
                    spent,
                    spent // 6,
                    spent * {"opal-4": 9e-6, "opal-4-mini": 1e-6, "quartz-2": 4e-6}[model],
                )
                self.post(f"/runs/{run}/complete", {"result": {"ok": True}, "leaseOwner": owner})

    def day(self) -> None:
        """What was done in the last hours."""
        for number in range(46, 0, -1):
            self.at(-number * 3.6 * MINUTE - self.random.randrange(MINUTE))
            workflow, queue, steps = self.random.choice(WORKFLOWS)
            customer = self.random.choice(CUSTOMERS)
            owner = f"worker-{self.random.randint(1, 4)}"
            run = self.enqueue(
                workflow, queue, input={"customer": customer, "ticket": 4000 + number}, metadata={"customer": customer}
            )
            self.wait(self.random.randint(20, 900))
            self.claim(queue, owner)
            for name in steps:
                step = self.step(run, name, owner, self.random.randint(80, 5200), {"name": name, "ok": True})
                if name in ("classify", "draft", "summarise"):
                    self.usage(run, step, "opal-4-mini", 2400, 380, self.random.uniform(0.001, 0.02))
            if number % 11 == 3:
                error = {"name": "HTTPError", "message": "502 Bad Gateway from crm.example.com", "stack": STACK}
                self.post(f"/runs/{run}/fail", {"error": error, "leaseOwner": owner, "retryable": False})
            elif number % 17 == 5:
                self.post(f"/runs/{run}/cancel", {"reason": "the ticket was closed", "actor": "Mina Okafor"})
            else:
                self.post(
                    f"/runs/{run}/complete", {"result": {"ticket": 4000 + number, "done": True}, "leaseOwner": owner}
                )

    def crash(self) -> str:
        """A report whose worker is killed while it drafts; another one finishes from the checkpoint."""
        self.at(-26 * MINUTE)
        run = self.enqueue(
            "research-report",
            "agents",
            input={"topic": "Tidal power in 2026", "depth": 3, "budget": 1.50},
            metadata={"customer": "Northwind", "requestedBy": "mina"},
            priority=5,
            maxAttempts=3,
        )
        self.wait(1400)
        self.claim("agents", "worker-2")
        self.state(run, {"phase": "searching", "found": 0}, label="started")
        self.step(run, "plan", "worker-2", 1900, {"questions": 4}, {"topic": "Tidal power in 2026"})
        step = self.step(run, "search", "worker-2", 6200, {"sources": 18}, {"questions": 4}, sideEffects=["read"])
        self.usage(run, step, "opal-4-mini", 8200, 900, 0.0142)
        self.state(run, {"phase": "reading", "found": 18}, reason="sources are in")
        children = [
            self.post(
                f"/runs/{run}/children",
                {"name": f"read-{topic}", "workflowName": "read-source", "input": {"topic": topic}, "metadata": {}},
            )["run"]["id"]
            for topic in ("costs", "sites", "policy")
        ]
        for index, child in enumerate(children):
            self.post(f"/runs/{child}/begin", None, **{"x-tidebase-worker": f"worker-{index + 3}"})
            part = self.step(child, "fetch", f"worker-{index + 3}", 1800 + 900 * index, {"pages": 6})
            self.usage(child, part, "opal-4-mini", 5100, 640, 0.0081)
            self.step(child, "extract", f"worker-{index + 3}", 2600, {"claims": 14})
            self.post(f"/runs/{child}/complete", {"result": {"claims": 14}, "leaseOwner": f"worker-{index + 3}"})
        self.post(f"/runs/{run}/heartbeat", {"leaseOwner": "worker-2"})
        step = self.step(run, "outline", "worker-2", 3100, {"chapters": ["Costs", "Sites", "Policy"]})
        self.usage(run, step, "opal-4", 6100, 1400, 0.0712)
        self.begin_step(run, "draft", "worker-2", {"chapters": 3})
        self.wait(8700)
        self.post(f"/runs/{run}/heartbeat", {"leaseOwner": "worker-2"})
        self.wait(LEASE_MS + 2500)  # it was killed: nobody renews the lease
        self.expire_leases()
        self.wait(1200)
        self.claim("agents", "worker-3")
        step = self.step(
            run,
            "draft",
            "worker-3",
            14_300,
            {"words": 2140, "text": "# Tidal power in 2026\n\nSites with a spring range over 5 m …"},
            {"chapters": 3},
        )
        self.usage(run, step, "opal-4", 21_400, 5200, 0.3264)
        self.state(
            run,
            {"phase": "checking", "found": 18, "words": 2140},
            label="draft",
            importance="milestone",
            createdBy="worker-3",
        )
        check = self.begin_step(run, "check-facts", "worker-3")
        self.wait(2200)
        error = {"name": "TimeoutError", "message": "the search took longer than 2 s", "stack": STACK}
        self.post(f"/runs/{run}/steps/{check}/fail", {"leaseOwner": "worker-3", "error": error, "retryable": True})
        self.wait(1500)
        self.step(run, "check-facts", "worker-3", 4200, {"checked": 31, "wrong": 0})
        gate = self.post(
            f"/runs/{run}/gates/begin",
            {
                "name": "approve",
                "prompt": "Send the report to Northwind?",
                "data": {"words": 2140, "to": "reports@northwind.example"},
            },
        )["gate"]
        self.post(f"/runs/{run}/wait", {"leaseOwner": "worker-3", "for": {"gateId": gate["id"]}})
        self.wait(7 * MINUTE)
        self.post(
            f"/runs/{run}/gates/{gate['id']}/resolve",
            {
                "token": gate["resolveToken"],
                "decision": "approved",
                "actor": "Mina Okafor",
                "payload": {"note": "Good. Mention the Severn study next time."},
            },
        )
        self.wait(300)
        self.claim("agents", "worker-1")
        self.step(
            run,
            "send",
            "worker-1",
            900,
            {"messageId": "<8124@mail.example>"},
            {"to": "reports@northwind.example"},
            sideEffects=["email"],
            idempotencyKey=f"{run}:send",
        )
        self.state(run, {"phase": "sent", "found": 18, "words": 2140}, label="sent")
        self.post(
            f"/runs/{run}/complete",
            {"result": {"words": 2140, "sent": True, "costUsd": 0.4361}, "leaseOwner": "worker-1"},
        )
        return run

    def expire_leases(self) -> None:
        """As the reconciler does, which leaves expired leases alone for a while after a server's start."""
        self.connection.execute("select tidebase.expire_leases(100)")

    def approvals(self) -> str:
        first = ""
        for minutes, workflow, prompt, data in APPROVALS:
            self.at(-minutes * MINUTE)
            run = self.enqueue(
                workflow, "mail", input={"customer": data["customer"]}, metadata={"customer": data["customer"]}
            )
            self.claim("mail", "worker-4")
            step = self.step(run, "draft", "worker-4", 3400, {"words": 180})
            self.usage(run, step, "opal-4-mini", 3100, 420, 0.0093)
            self.state(run, {"phase": "waiting for a person", "customer": data["customer"]})
            gate = self.post(
                f"/runs/{run}/gates/begin",
                {
                    "name": "approve",
                    "prompt": prompt,
                    "data": data,
                    "capability": "send:customer-mail",
                    "timeoutMs": 3 * DAY,
                },
            )["gate"]
            self.post(f"/runs/{run}/wait", {"leaseOwner": "worker-4", "for": {"gateId": gate["id"]}})
            first = first or run
        return first

    def ambiguous(self) -> str:
        self.at(-31 * MINUTE)
        run = self.enqueue(
            "refund", "billing", input={"order": "A-20714", "amount": 129.90}, metadata={"customer": "Bluefin Charter"}
        )
        self.claim("billing", "worker-1")
        self.step(run, "look-up-order", "worker-1", 700, {"order": "A-20714", "paid": 129.90})
        self.step(run, "check-policy", "worker-1", 1600, {"eligible": True})
        self.begin_step(run, "pay-out", "worker-1", {"amount": 129.90}, sideEffects=["payment"])
        self.wait(LEASE_MS + 2000)
        self.expire_leases()
        self.claim("billing", "worker-3")
        request = urllib.request.Request(
            f"{self.url}/runs/{run}/steps/begin",
            json.dumps(
                {
                    "name": "pay-out",
                    "inputHash": hashlib.sha256(json.dumps({"amount": 129.90}).encode()).hexdigest(),
                    "leaseOwner": "worker-3",
                }
            ).encode(),
            {"content-type": "application/json"},
        )
        with contextlib.suppress(urllib.error.HTTPError):  # 409 manual_review: the step is ambiguous
            urllib.request.urlopen(request, timeout=30)
        error = {"name": "ManualReview", "message": "step 'pay-out' waits for a person's review"}
        self.post(f"/runs/{run}/fail", {"error": error, "leaseOwner": "worker-3", "retryable": False})
        return run

    def failure(self) -> str:
        self.at(-12 * MINUTE)
        run = self.enqueue(
            "sync-crm", "sync", input={"since": "2026-11-20"}, maxAttempts=1, metadata={"customer": "Halden Optics"}
        )
        self.claim("sync", "worker-2")
        self.step(run, "export", "worker-2", 2600, {"rows": 4120})
        self.step(run, "transform", "worker-2", 900, {"rows": 4118})
        step = self.begin_step(
            run, "upload", "worker-2", {"rows": 4118}, sideEffects=["crm"], idempotencyKey=f"{run}:upload"
        )
        self.wait(5100)
        error = {"name": "ConnectionError", "message": "crm.example.com refused the connection", "stack": STACK}
        self.post(f"/runs/{run}/steps/{step}/fail", {"leaseOwner": "worker-2", "error": error, "retryable": False})
        self.post(f"/runs/{run}/fail", {"error": error, "leaseOwner": "worker-2", "retryable": False})
        return run

    def schedules(self) -> None:
        self.at(0)
        for name, cron, workflow, zone in (
            ("nightly-sync", "30 2 * * *", "sync-crm", "UTC"),
            ("monday-digest", "0 9 * * 1", "weekly-digest", "Europe/Berlin"),
            ("heartbeat-check", "*/15 * * * *", "probe", "UTC"),
        ):
            self.send(
                "PUT",
                f"/schedules/{name}",
                {
                    "cron": cron,
                    "workflowName": workflow,
                    "timezone": zone,
                    "queue": "sync",
                    "enabled": name != "heartbeat-check",
                },
            )

    def waiting(self) -> None:
        """Runs that do not go on, each for another reason."""
        self.at(-9 * MINUTE)
        run = self.enqueue(
            "onboard",
            "agents",
            input={"customer": "Kestrel Maps"},
            metadata={"customer": "Kestrel Maps"},
            maxAttempts=3,
        )
        self.claim("agents", "worker-2")
        self.step(run, "create-account", "worker-2", 800, {"id": 88})
        self.at(-12_000)
        self.at(-40_000)
        self.enqueue("invoice", "pdf", input={"order": "A-20802"}, metadata={"customer": "Bluefin Charter"})
        self.at(-20_000)
        run = self.enqueue("sync-crm", "sync", input={"since": "2026-11-23"}, maxAttempts=3)
        self.claim("sync", "worker-1")
        self.step(run, "export", "worker-1", 1500, {"rows": 88})
        self.at(0)
        self.post(
            f"/runs/{run}/fail",
            {"error": {"name": "TimeoutError", "message": "no answer within 30 s"}, "leaseOwner": "worker-1"},
        )
        self.enqueue("weekly-digest", "mail", input={}, delayMs=2 * HOUR)

    def live(self) -> str:
        self.at(-41_000)
        run = self.enqueue(
            "research-report", "agents", input={"topic": "Kelp farming"}, metadata={"customer": "Halden Optics"}
        )
        self.wait(600)
        self.claim("agents", "worker-3")
        self.step(run, "plan", "worker-3", 2100, {"questions": 5})
        self.step(run, "search", "worker-3", 7400, {"sources": 23}, sideEffects=["read"])
        step = self.step(run, "outline", "worker-3", 4100, {"chapters": 4})
        self.usage(run, step, "opal-4", 5100, 900, 0.0521)
        self.begin_step(run, "draft", "worker-3", {"chapters": 4})
        self.at(-2000)
        self.post(f"/runs/{run}/heartbeat", {"leaseOwner": "worker-3"})
        return run


CUSTOMERS = ["Northwind", "Bluefin Charter", "Halden Optics", "Kestrel Maps", "Ostra Foods"]
WORKFLOWS = [
    ("triage-ticket", "agents", ["fetch", "classify", "reply"]),
    ("sync-crm", "sync", ["export", "transform", "upload"]),
    ("weekly-digest", "mail", ["collect", "summarise", "send"]),
    ("invoice", "billing", ["look-up-order", "render", "file"]),
]
APPROVALS = [
    (
        134,
        "answer-customer",
        "Send this answer to Ostra Foods?",
        {
            "customer": "Ostra Foods",
            "subject": "Late delivery 20611",
            "text": "Dear Ms Lind,\nyour delivery left the harbour this morning"
            " and will be with you on Thursday before noon.",
        },
    ),
    (
        52,
        "answer-customer",
        "Send this answer to Kestrel Maps?",
        {
            "customer": "Kestrel Maps",
            "subject": "Licence renewal",
            "text": "Dear Mr Aho,\nthe new licence is attached. It is valid until 30 November 2027.",
        },
    ),
    (
        6,
        "publish-post",
        "Publish “What the tide tables leave out”?",
        {"customer": "Northwind", "words": 1310, "channel": "blog"},
    ),
]
STACK = (
    'Traceback (most recent call last):\n  File "workflows/sync.py", line 81, in upload\n'
    '    response = session.post(url, json=rows)\n'
    '  File "workflows/http.py", line 34, in post\n    raise ConnectionError(f"{host} refused the connection")\n'
    "ConnectionError: crm.example.com refused the connection"
)


if __name__ == "__main__":
    import sys

    print(json.dumps(Story(sys.argv[1], sys.argv[2]).tell(), indent=2))
