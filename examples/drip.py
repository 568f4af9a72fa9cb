"""A drip campaign: three messages over two weeks, as a function that sleeps. Between them a campaign is a row.

Restart the workers and the server as you like meanwhile: each message is sent once, on its day.
From the repository, with a server under way (python tidebase.py); DRIP_DAY_S makes days shorter, to watch it:

    python -m examples.drip ada@example.org            # enrols somebody, once however often you say so
    DRIP_DAY_S=2 python -m examples.drip work          # a worker; start as many as you like
"""

import os
import sys

from tidebase import Tidebase

DAY_S = float(os.environ.get("DRIP_DAY_S", 86_400))
tide = Tidebase()


def send(to, subject):
    print(f"to {to}: {subject}", flush=True)  # your mail provider, with an idempotency key
    return subject


@tide.workflow("drip")
def drip(run, input):
    sent = []
    for day, subject in [(0, "Welcome"), (3, "Three things to try"), (11, "How is it going?")]:
        run.sleep(day * DAY_S, name=f"until day {day} is over")  # counted from the message before
        sent.append(run.step(subject, lambda subject=subject: send(input["to"], subject), side_effects=["email"],
                             idempotency_key=f"{run.run_id} {subject}"))
    return sent


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        tide.work(concurrency=4)
    else:
        [to] = sys.argv[1:]
        print(tide.enqueue("drip", input={"to": to}, dedupe_key=to)["run"]["id"])
