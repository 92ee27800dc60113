"""Stage 0, for all clouds: get the program, check it, and become `cml_runner.boot`.

This is embedded into start scripts, behind the module of one cloud (`first_aws` …), which says how
an object is read and put with the machine's identity (`ask`) and how the machine ends (`end`).
So both are short and import nothing of ours; docstrings, comments and types stay behind.

The first machine of a task that can't have the program is replaced, the next ones aren't.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from cml_runner.boot.first_aws import ask, end

PAUSES = [1, 2, 5] + 60 * [10]  # seconds; ten minutes, until new rights are known everywhere


def main(url: str, sha256: str, *more: str) -> None:
    """Become the program, or end this machine with exit code 78."""
    place = f"/opt/cml-runner/programs/{sha256}.whl"
    try:
        problem = fetch(url, sha256, place)
    except OSError as error:  # a full disk
        problem = f"{error}"
    if problem:
        give_up(url, sha256, problem)
        sys.exit(78)
    os.environ["PYTHONPATH"] = place
    os.chdir("/")  # it comes before that path
    boot = ["python3", "-m", "cml_runner.boot", "machine", url, *more]
    os.execv(sys.executable, boot)


def fetch(url: str, sha256: str, place: str) -> str:
    """Get the program into a file; return why that can't be."""
    proxies = {name: os.environ[name] for name in os.environ if name.endswith("_PROXY")}
    for number, pause in enumerate(PAUSES):
        for name, value in proxies.items():  # the bucket may need them, or be near
            os.environ[name] = "" if number % 2 else value
        try:
            wheel = ask(url, f"programs/{sha256}.whl")
            break
        except Exception as error:
            reason = f"the program can't be fetched: {error}"
            print(reason)
            if getattr(error, "code", 0) == 404:
                return reason
            time.sleep(pause)
    else:
        return reason
    if hashlib.sha256(wheel).hexdigest() != sha256:
        return "the program in the bucket is wrong: its SHA-256 is another"
    with open(place, "wb") as file:
        file.write(wheel)
    return ""


def give_up(url: str, sha256: str, reason: str) -> None:
    """Say why, and end this machine, however long that takes; only the first one is replaced.

    One that may not say so isn't replaced either: rights don't come by themselves.
    """
    last = put(url, "failed-000-00", b"0", True) in (403, 409, 412)
    now, host = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), os.uname().nodename
    status = {"at": now, "since": now, "runner": host, "reason": reason}
    status.update({"state": "failed", "program": sha256[:12]})
    put(url, f"log-000-000000.txt~{last:d}", f"{now} {reason}\n".encode())
    put(url, "status-000.json", json.dumps({**status, "code": 11}).encode())
    while True:
        try:
            end(url, last)
            break
        except Exception as error:
            print(error)
            time.sleep(10)


def put(url: str, name: str, content: bytes, once: bool = False) -> int:
    """Put an object into the task's part of the bucket; return HTTP's code if that can't be."""
    try:
        ask(url, f"{urlsplit(url).path[1:]}/{name}", content, once)
    except Exception as error:
        print(error)
        return int(getattr(error, "code", -1))
    return 0
