#!/usr/bin/env python3
"""What a second server process brings, where PostgreSQL is the limit and where it is not.

Two requests, sent again on each of 32 connections as soon as they are answered, at a server of one process and one of
two, by turns: a heartbeat, which costs PostgreSQL about as much as the server; and a step that the server refuses for
what it says, which goes the whole way through the server and never reaches PostgreSQL.

The load comes from one process that does little else than to send the same bytes. Quote the ratios, and say on how many
cores: load, server and PostgreSQL share them.
"""
import argparse
import asyncio
import json
import selectors
import socket
import time

from common import Connection, Window, database, median, postgres, show, tidebase

CONNECTIONS = 32


async def heartbeats(url):
    """A request for each connection: each is of a run of its own."""
    client, requests = Connection(url), []
    for _ in range(CONNECTIONS):
        run = (await client.call("POST", "/runs/bench"))["run"]["id"]
        owner = (await client.call("POST", f"/runs/{run}/begin"))["leaseOwner"]
        requests.append(("/heartbeats", {"runs": [{"id": run, "leaseOwner": owner}]}))
    client.close()
    return requests


async def refusals(url):
    """A request for each connection: all but one member of it is right."""
    body = {"leaseOwner": "bench", "name": 5, "inputHash": "h", "output": {"text": "x" * 200}}
    return [("/runs/bench/steps", body)] * CONNECTIONS


def rate(url, requests, status, seconds):
    """Answers a second.  Raises SystemExit at any with another status."""
    address, window = url.removeprefix("http://"), Window(seconds)
    host, port = address.split(":")
    with selectors.DefaultSelector() as selector:
        for path, body in requests:
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n" \
                   f"content-length: {len(data)}\r\n\r\n"
            connection = socket.create_connection((host, int(port)))
            selector.register(connection, selectors.EVENT_READ, (head.encode() + data, bytearray()))
            connection.sendall(head.encode() + data)
        while not window.is_over():
            for key, _ in selector.select(1):
                request, answer = key.data
                answer += key.fileobj.recv(65_536)
                if not is_whole(answer):
                    continue
                if not answer.startswith(b"HTTP/1.1 %d " % status):
                    raise SystemExit(f"unexpected answer: {bytes(answer[:200])!r}")
                window.note("answer", time.perf_counter())
                answer.clear()
                key.fileobj.sendall(request)
        for key in list(selector.get_map().values()):
            key.fileobj.close()
    return window.rate("answer")


def is_whole(answer):
    """Whether these bytes are all of an answer that tells its length."""
    head, end, body = answer.partition(b"\r\n\r\n")
    return bool(end) and len(body) == int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--postgres", help="to make databases in; default: one of our own")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rates = {}
    with postgres(args.postgres) as server_url:
        for _ in range(args.rounds):
            for processes in (1, 2):
                with database(server_url) as database_url, tidebase(database_url, processes) as server:
                    for name, requests, status in (("heartbeats", heartbeats, 200), ("refusals", refusals, 400)):
                        answered = rate(server.url, asyncio.run(requests(server.url)), status, args.seconds)
                        rates.setdefault((name, processes), []).append(answered)
    for name in ("heartbeats", "refusals"):
        one, two = median(rates[name, 1]), median(rates[name, 2])
        ratio = median(then / now for now, then in zip(rates[name, 1], rates[name, 2], strict=True))
        show({"request": name, "oneProcess": one, "twoProcesses": two, "ratio": round(ratio, 2)}, args.json,
             "{request}: one process {oneProcess:.0f}/s, two {twoProcesses:.0f}/s, {ratio} times as many")


if __name__ == "__main__":
    main()
