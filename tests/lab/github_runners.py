"""The fake's side of the made-up protocol between GitHub and its runner program."""

from __future__ import annotations

import re
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.lab.github_api import Answer, Call, runner_files
from tests.lab.github_state import Place, Refused, Runner, missing, runner_of

if TYPE_CHECKING:
    from collections.abc import Callable


def configure(call: Call) -> Answer:
    """Register a runner; it shows a registration token."""
    gh, body = call.gh, call.body
    place = _place(call, "registration")
    group = body.get("group") or "Default"
    number = next((key for key, name in place.groups.items() if name == group), None)
    if number is None:
        raise Refused(400, f'Could not find any self-hosted runner group named "{group}".')
    clash = [one for one in gh.found.values() if one.place is place and one.name == body["name"]]
    for old in clash if body["replace"] else []:
        gh.remove(old)
    more = {key: body[key] for key in ("ephemeral", "work", "os", "arch", "version")}
    runner = gh.register(place, body["name"], body["labels"], group=number, **more)
    return Answer(200, runner_files(call.at, runner))


def remove(call: Call) -> Answer:
    """Remove a runner; it shows a remove token."""
    place = _place(call, "remove")
    found = call.gh.found.get(call.body["id"])
    if found and found.place is place:
        call.gh.remove(found)
    return Answer(200, {})


def open_session(call: Call) -> Answer:
    gh, runner, version = call.gh, _runner(call), call.body["version"]
    gh.sweep()
    what = gh.next_mode(runner, ("conflict", "deprecated", "retryable"))
    if what == "deprecated" or version in gh.deprecated:
        raise Refused(410, f"Runner version v{version} is deprecated and cannot receive messages.")
    if what == "retryable":
        raise Refused(500, "Something went wrong.")
    if what == "conflict":
        raise Refused(423, "Error: Conflict")  # which lasts for longer than anybody waits
    if runner.online:
        raise Refused(409, "Error: Conflict")
    runner.session, runner.seen = secrets.token_hex(8), time.monotonic()
    runner.version, runner.os, runner.arch = version, call.body["os"], call.body["arch"]
    gh.changed.notify_all()
    return Answer(200, {"session": runner.session})


def message(call: Call) -> Answer:
    runner = _runner(call)
    if runner.session != call.query.get("session"):
        raise Refused(409, "Another session took over.")
    found = call.gh.next_message(runner, call.alive)
    if found is None:
        return Answer(204)
    return Answer(200, {**found, **(_job(call, runner) if found["type"] == "job" else {})})


def close_session(call: Call) -> Answer:
    runner = _runner(call)
    if runner.session == call.query.get("session"):
        runner.session = ""
        call.gh.changed.notify_all()
    return Answer(204)


def start(call: Call) -> Answer:
    call.gh.start(_running(call).job or missing())
    return Answer(200, {})


def log(call: Call) -> Answer:
    job = _running(call).job or missing()
    job.output += call.body
    call.gh.changed.notify_all()
    return Answer(200, {})


def finish(call: Call) -> Answer:
    runner = _running(call)
    if runner.job and (message := call.body.get("message")):
        runner.job.message = message
    call.gh.finish(runner, call.body["result"])
    return Answer(200, {})


def _job(call: Call, runner: Runner) -> dict[str, object]:
    job = runner.job or missing()
    description, run = job.description, job.run
    key = description.key or re.sub(r"\W+", "-", description.name.lower()).strip("-")
    variables = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_ACTOR": "mona",
        "GITHUB_API_URL": f"{call.at.html}/api/v3",
        "GITHUB_EVENT_NAME": "push",
        "GITHUB_JOB": key,
        "GITHUB_REF": "refs/heads/main",
        "GITHUB_REPOSITORY": run.repository.name,
        "GITHUB_RUN_ATTEMPT": str(job.attempt),
        "GITHUB_RUN_ID": str(run.id),
        "GITHUB_RUN_NUMBER": str(run.id),
        "GITHUB_SERVER_URL": call.at.html,
        "GITHUB_WORKFLOW": run.name,
    }
    shown = {"id": job.id, "name": job.name, "script": description.script}
    return {**shown, "variables": variables, "environment": dict(description.environment)}


def _runner(call: Call) -> Runner:
    return runner_of(call.gh, call.authorization.partition(" ")[2])


def _running(call: Call) -> Runner:
    runner = _runner(call)
    job = runner.job or missing()
    return runner if job.id == int(call.parts["id"]) else missing()


def _place(call: Call, what: str) -> Place:
    """Check the token of a runner that comes or goes."""
    scheme, _, value = call.authorization.partition(" ")
    kind, place, expires = call.gh.registrations.get(value) or missing()
    here = urlsplit(call.body["url"]).path.strip("/").lower() == place.path.lower()
    good = scheme == "RemoteAuth" and kind == what and expires > call.gh.clock()
    return place if good and here else missing()


JOB = r"/_runner/jobs/(?P<id>\d+)"
ROUTES: tuple[tuple[str, str, Callable[[Call], Answer]], ...] = (
    ("POST", r"/_runner/configure", configure),
    ("POST", r"/_runner/remove", remove),
    ("POST", r"/_runner/session", open_session),
    ("DELETE", r"/_runner/session", close_session),
    ("POST", rf"{JOB}/start", start),
    ("POST", rf"{JOB}/log", log),
    ("POST", rf"{JOB}/finish", finish),
)


def answer(call: Call) -> Answer:
    """Do what a runner's program asks for; raise Refused."""
    if (call.method, call.path) == ("GET", "/_runner/message"):
        return message(call)  # it waits, so it takes the lock by itself
    for method, pattern, act in ROUTES:
        match = re.fullmatch(pattern, call.path) if method == call.method else None
        if match:
            call.parts = match.groupdict()
            with call.gh.changed:
                return act(call)
    raise Refused(404, "Not Found")
