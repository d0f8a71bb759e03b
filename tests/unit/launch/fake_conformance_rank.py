"""A rank of the conformance suite without torch, which does what a check's name says."""

# ruff: noqa: T201 - it answers on stdout

import json
import os
import sys
import time
from typing import Any

SUITE = (
    "well",
    "deviates",
    "well again",
    "hangs",
    "dies",
    "well at last",
    "loses a rank",
    "aborts",
)


def introduction() -> dict[str, Any]:
    texts = {"needed_for": "everything", "fix": "mend it"}
    suite = [{"name": name, "ends_ranks": name in SUITE[-2:]} | texts for name in SUITE]
    told = {"device_type": "cpu", "debugging": "LOG=1 says more", "leaver_exit_code": 17}
    return told | {"suite": suite}


def answer(rank: int, request: dict[str, Any], ports: set[int]) -> dict[str, Any]:
    check, last = request["check"], rank == 1
    ports.add(request["port"])
    if check == "hangs" and last:
        time.sleep(100)
    if check == "dies" and last:
        print("libfake: no such file", file=sys.stderr, flush=True)
        os._exit(3)
    if check == "loses a rank" and last:
        os._exit(17)
    if check == "aborts" and not last:
        os.abort()
    if check == "deviates" and not last:
        return {"problem": f"sum of int64: got 3, not 4 (port {len(ports)})"}
    return {"problem": None}


def main() -> None:
    rank = int(sys.argv[2])
    print(json.dumps(introduction()), flush=True)
    ports: set[int] = set()
    for line in sys.stdin:
        print(json.dumps(answer(rank, json.loads(line), ports)), flush=True)


if __name__ == "__main__":
    main()
