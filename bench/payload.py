#!/usr/bin/env python3
"""The flow of flow.py, one write a step, with inputs and outputs of 200 bytes, 10 KB and 1 MB.

Prints steps and megabytes of payload a second, and the milliseconds of a step.
"""
import flow
from common import show, tidebase_of_our_own

SIZES = (200, 10_000, 1_000_000)


def main():
    parser = flow.parser()
    parser.set_defaults(one_write=True, concurrency=[8])
    args = parser.parse_args()
    with tidebase_of_our_own(args.server_processes, args.url) as server:
        for args.payload in SIZES:
            for concurrency in args.concurrency:
                figures = flow.measure(args, server.url, concurrency, server.pids)
                figures.update(payload=args.payload, **figures["milliseconds"].get("step", {"p50": 0, "p99": 0}),
                               megabytesPerSecond=round(figures["stepsPerSecond"] * 2 * args.payload / 1e6, 2))
                show(figures, args.json, "{payload:>9,} bytes c={concurrency:<3d} {stepsPerSecond:8.1f} steps/s "
                     "{megabytesPerSecond:7.2f} MB/s   step p50 {p50:7.2f} ms p99 {p99:7.2f} ms")


if __name__ == "__main__":
    main()
