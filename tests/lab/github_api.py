"""GitHub's REST API over the fake's state: who may do what, and what is answered.

Guesses, where GitHub documents nothing: the words of refusals, that a job of an older attempt
can't be run again, and that a new attempt gives new ids to the jobs that it leaves alone.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from tests.lab import github_shapes as shapes
from tests.lab.github_state import App, Job, Place, Refused, Run, Runner, Token, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.lab.github import GitHub

HOUR = 3600
LEVELS = {"": 0, "read": 1, "write": 2, "admin": 3}
SUBJECTS = {"repos": "administration", "orgs": "organization_self_hosted_runners"}
OLD = "Unable to retry this workflow run because it was created over a month ago"


@dataclass
class Call:
    """One request, as far as it is understood."""

    gh: GitHub
    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    authorization: str
    at: shapes.Address
    alive: Callable[[], bool] = lambda: True
    caller: Token | App | None = None
    place: Place = None  # type: ignore[assignment]  # set for every path that names one
    parts: Mapping[str, str] = None  # type: ignore[assignment]

    @property
    def owner_kind(self) -> str:
        return self.gh.owner_kind(self.place.owner)

    @property
    def repository(self) -> dict[str, Any]:
        role = self.caller.role if isinstance(self.caller, Token) else "admin"
        return shapes.full_repository(self.at, self.place, self.owner_kind, role)

    @property
    def runner(self) -> Runner:
        found = self.gh.found.get(int(self.parts["id"]))
        return found if found and found.place is self.place else missing()

    @property
    def run(self) -> Run:
        found = self.gh.runs.get(int(self.parts["id"]))
        return found if found and found.repository is self.place else missing()

    @property
    def job(self) -> Job:
        runs = [run for run in self.gh.runs.values() if run.repository is self.place]
        jobs = [job for run in runs for jobs in run.attempts for job in jobs]
        wanted = int(self.parts["id"])
        return next((job for job in jobs if job.id == wanted), None) or missing()


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any = None  # JSON, or bytes
    headers: Mapping[str, str] | None = None


# Who asks, and what they may do


def identify(gh: GitHub, authorization: str) -> Token | App | None:
    """Find out whose credential this is; 401 if it isn't good."""
    value = authorization.partition(" ")[2]
    if not authorization:
        return None
    if value.count(".") == 2:
        return _app(gh, value)
    token = gh.tokens.get(value)
    if token is None or token.expires <= gh.clock():
        raise Refused(401, "Bad credentials")
    return token


def _app(gh: GitHub, value: str) -> App:
    import jwt

    for app in gh.apps:
        rules: Any = {"verify_exp": False, "verify_iat": False, "require": ["exp", "iat", "iss"]}
        try:
            claims = jwt.decode(value, app.public, algorithms=["RS256"], options=rules)
        except jwt.PyJWTError:
            continue
        if str(claims["iss"]) in (str(app.id), app.client_id):
            _check_times(claims, gh.clock())
            return app
    raise Refused(401, "A JSON web token could not be decoded")


def _check_times(claims: Mapping[str, Any], now: float) -> None:
    if claims["iat"] > now + 5:
        raise Refused(401, "'Issued at' claim ('iat') must be an Integer representing the past")
    if claims["exp"] > now + 660:
        raise Refused(401, "'Expiration time' claim ('exp') is too far in the future")
    if claims["exp"] <= now:
        raise Refused(401, "'Expiration time' claim ('exp') must be in the future")


def allow(call: Call, need: str) -> None:
    """Raise what GitHub answers if the caller may not do this; need is "subject:level"."""
    if need == "jwt" and not isinstance(call.caller, App):
        raise Refused(401, "A JSON web token could not be decoded")
    if need in ("", "jwt"):
        return
    subject, _, level = need.partition(":")
    if isinstance(call.caller, App):
        raise Refused(403, "Resource not accessible by integration")
    if call.caller is None:
        _allow_anybody(call, subject)
    elif call.caller.kind == "classic":
        _allow_classic(call.caller, call.place, subject, level)
    else:
        _allow_permissions(call.caller, call.place, subject, level)


def _allow_anybody(call: Call, subject: str) -> None:
    if call.place is None or subject == "runners":
        raise Refused(401, "Requires authentication")
    if call.place.private:
        missing()


def _allow_classic(token: Token, place: Place, subject: str, level: str) -> None:
    if subject == "user":
        return
    scopes = {
        "repos": {"repo"} if place.private else {"repo", "public_repo"},
        "orgs": {"admin:org"},
        "enterprises": {"manage_runners:enterprise"},
    }[place.kind]
    seen = not place.private if place.kind == "repos" else place.kind == "orgs"
    reading = level == "read" and subject != "runners"
    if not token.scopes & scopes and not (seen and reading):
        if not seen:
            missing()
        accepted = ", ".join(sorted(scopes))
        raise Refused(403, _not_admin(place), X_Accepted_OAuth_Scopes=accepted)
    wanted = {"runners": "admin"}.get(subject, level)
    if LEVELS[token.role] < LEVELS[wanted]:
        raise Refused(403, _not_admin(place))


def _not_admin(place: Place) -> str:
    name = {"repos": "Repository", "orgs": "Organization", "enterprises": "Enterprise"}[place.kind]
    return f"Must have admin rights to {name}."


def _allow_permissions(token: Token, place: Place, subject: str, level: str) -> None:
    who = "personal access token" if token.kind == "fine-grained" else "integration"
    refused = f"Resource not accessible by {who}"
    if subject == "user":
        if token.kind != "fine-grained":
            raise Refused(403, refused)
        return
    inside = token.places is None or bool({place.name.lower(), place.owner.lower()} & token.places)
    if not inside and place.private:
        missing()
    wanted = SUBJECTS.get(place.kind, "none") if subject == "runners" else subject
    granted = token.permissions.get(wanted, "read" if wanted == "metadata" else "")
    if not inside or LEVELS[granted] < LEVELS[level]:
        raise Refused(403, refused, X_Accepted_GitHub_Permissions=f"{wanted}={level}")


# Runners


def list_runners(call: Call) -> Answer:
    name = call.query.get("name")
    mine = [one for one in call.gh.runners() if one.place is call.place]
    mine = [one for one in mine if name in (None, one.name)]
    return _page(call, "runners", mine, shapes.runner)


def get_runner(call: Call) -> Answer:
    return Answer(200, shapes.runner(call.runner))


def delete_runner(call: Call) -> Answer:
    if call.runner.busy:
        name = call.runner.name
        raise Refused(422, f'Bad request - Runner "{name}" is still running a job"')
    call.gh.remove(call.runner)
    return Answer(204)


def list_groups(call: Call) -> Answer:
    return _page(
        call,
        "runner_groups",
        list(call.place.groups),
        lambda number: shapes.group(call.at, call.place, number),
    )


def runner_token(call: Call) -> Answer:
    """Answer with a token to register, or to remove, a runner."""
    value = "A" + secrets.token_hex(14).upper()
    expires = call.gh.clock() + HOUR
    call.gh.registrations[value] = call.parts["what"], call.place, expires
    return Answer(201, {"token": value, "expires_at": shapes.moment(expires)})


def jit(call: Call) -> Answer:
    """Register a runner for one job."""
    body = call.body or {}
    absent = [key for key in ("name", "runner_group_id", "labels") if key not in body]
    if absent:
        wrong = "\n".join(f'"{key}" wasn\'t supplied.' for key in absent)
        raise Refused(422, f"Invalid request.\n\n{wrong}")
    if not 1 <= len(body["labels"]) <= 100:
        raise Refused(422, "Invalid request.\n\nLabels must have between 1 and 100 items.")
    group = body["runner_group_id"]
    if group not in call.place.groups:
        missing()
    work = body.get("work_folder", "_work")
    runner = call.gh.register(
        call.place, body["name"], body["labels"], group=group, ephemeral=True, work=work
    )
    return Answer(201, {"runner": shapes.runner(runner), "encoded_jit_config": _jit(call, runner)})


def runner_files(at: shapes.Address, runner: Runner) -> dict[str, Any]:
    """Write the files that a runner's program keeps; a cut of the real ones' fields."""
    return {
        ".runner": {
            "agentId": runner.id,
            "agentName": runner.name,
            "poolId": runner.group,
            "poolName": runner.place.groups[runner.group],
            "ephemeral": runner.ephemeral,
            "serverUrl": f"{at.html}/_runner",
            "gitHubUrl": f"{at.html}/{runner.place.path}",
            "workFolder": runner.work,
        },
        ".credentials": {"scheme": "OAuth", "data": {"clientId": str(runner.id)}},
        ".credentials_rsaparams": {"d": runner.key},
    }


def _jit(call: Call, runner: Runner) -> str:
    files = {
        name: base64.b64encode(json.dumps(content).encode()).decode()
        for name, content in runner_files(call.at, runner).items()
    }
    return base64.b64encode(json.dumps(files).encode()).decode()


def list_downloads(call: Call) -> Answer:
    gh = call.gh
    return Answer(200, shapes.downloads(call.at, gh.version, gh.sums()))


def deprecation(call: Call) -> Answer:
    version = call.parts["id"]
    if version not in call.gh.deprecations:
        missing()
    registration, runtime = call.gh.deprecations[version]
    dates = {"registration_deprecates_at": registration, "runtime_deprecates_at": runtime}
    return Answer(200, {"runner_version": version, **{k: v for k, v in dates.items() if v}})


def latest_release(call: Call) -> Answer:
    gh = call.gh
    return Answer(200, shapes.release(call.at, gh.version, gh.sums()))


# Runs and jobs


def get_run(call: Call) -> Answer:
    return Answer(200, shapes.run(call.at, call.run, call.owner_kind))


def list_runs(call: Call) -> Answer:
    runs = [run for run in reversed(call.gh.runs.values()) if run.repository is call.place]
    status = call.query.get("status")
    runs = [run for run in runs if status in (None, run.status, run.conclusion)]
    return _page(call, "workflow_runs", runs, lambda run: shapes.run(call.at, run, call.owner_kind))


def list_jobs(call: Call) -> Answer:
    attempt = int(call.parts.get("attempt") or call.run.attempt)
    if not 1 <= attempt <= call.run.attempt:
        missing()
    jobs = call.run.attempts[attempt - 1]
    if call.query.get("filter") == "all":
        jobs = [job for one in call.run.attempts for job in one]
    shown = [job for job in jobs if job.status != "blocked"]
    return _page(call, "jobs", shown, lambda job: shapes.job(call.at, job))


def get_job(call: Call) -> Answer:
    return Answer(200, shapes.job(call.at, call.job))


def list_annotations(call: Call) -> Answer:
    return Answer(200, shapes.notes(call.at, call.job))


def rerun_job(call: Call) -> Answer:
    job = call.job
    _check_over(job.run, "The workflow run containing this job is already running")
    if job not in job.run.jobs:
        raise Refused(403, "This job can't be run again: it belongs to an older attempt")
    call.gh.rerun(job.run, {job.name})
    return Answer(201, {})


def rerun_failed(call: Call) -> Answer:
    _check_over(call.run, "This workflow is already running")
    names = {job.name for job in call.run.jobs if job.conclusion in ("failure", "cancelled")}
    if not names:
        raise Refused(403, "This workflow run cannot be retried")
    call.gh.rerun(call.run, names)
    return Answer(201, {})


def rerun(call: Call) -> Answer:
    _check_over(call.run, "This workflow is already running")
    call.gh.rerun(call.run, {job.name for job in call.run.jobs})
    return Answer(201, {})


def cancel(call: Call) -> Answer:
    if call.run.status == "completed":
        raise Refused(409, "Cannot cancel a workflow run that is completed.")
    call.gh.cancel(call.run, force=call.path.endswith("force-cancel"))
    return Answer(202, {})


def _check_over(run: Run, message: str) -> None:
    if run.status != "completed":
        raise Refused(403, message)
    if run.too_old:
        raise Refused(403, OLD)


# Repositories, users and apps


def get_repository(call: Call) -> Answer:
    return Answer(200, call.repository)


def get_user(call: Call) -> Answer:
    return Answer(200, shapes.me(call.at, "mona"))


def get_app(call: Call) -> Answer:
    return Answer(200, shapes.application(call.at, _caller(call)))


def get_installation(call: Call) -> Answer:
    owner = call.place.owner
    if owner.lower() not in _caller(call).owners:
        missing()
    return Answer(200, shapes.installation(call.at, _caller(call), owner, call.owner_kind))


def installation_token(call: Call) -> Answer:
    app = _caller(call)
    owner = next((one for one in app.owners if str(sum(one.encode())) == call.parts["id"]), None)
    if owner is None:
        missing()
    expires = call.gh.clock() + HOUR
    permissions = dict((call.body or {}).get("permissions") or app.permissions)
    token = Token(
        f"ghs_{secrets.token_hex(18)}",
        "installation",
        permissions=permissions,
        places=frozenset({owner}),
        expires=expires,
    )
    shown = {"token": call.gh.issue(token), "expires_at": shapes.moment(expires)}
    return Answer(201, {**shown, "permissions": permissions, "repository_selection": "all"})


def rate_limit(call: Call) -> Answer:
    reset = int(time.time()) + HOUR
    core = {"limit": 5000, "remaining": 4999, "reset": reset, "used": 1}
    own = {**core, "limit": 10000, "remaining": 10000, "used": 0}
    names = {"core": core, "search": {**core, "limit": 30}, "actions_runner_registration": own}
    return Answer(200, {"resources": names, "rate": core})


def meta(_: Call) -> Answer:
    return Answer(200, {"verifiable_password_authentication": False})


def _caller(call: Call) -> App:
    assert isinstance(call.caller, App)
    return call.caller


def _page(call: Call, key: str, items: list[Any], shape: Callable[[Any], Any]) -> Answer:
    size = min(int(call.query.get("per_page", 30)), 100)
    number = int(call.query.get("page", 1))
    shown = items[(number - 1) * size : number * size]
    last = max(-(-len(items) // size), 1)
    links = {"prev": number - 1, "first": 1} if number > 1 else {}
    links |= {"next": number + 1, "last": last} if number < last else {}
    url = f"{call.at.api}{call.path}?"
    texts = [
        f'<{url}{urlencode({**call.query, "page": page})}>; rel="{rel}"'
        for rel, page in links.items()
    ]
    body = {"total_count": len(items), key: [shape(item) for item in shown]}
    return Answer(200, body, {"Link": ", ".join(texts)} if texts else None)


ANY = r"/(?P<kind>repos)/(?P<name>[^/]+/[^/]+)|/(?P<kind2>orgs|enterprises)/(?P<name2>[^/]+)"
REPO = r"/(?P<kind>repos)/(?P<name>[^/]+/[^/]+)"
MANY = r"/(?P<kind2>orgs|enterprises)/(?P<name2>[^/]+)"
RUNNERS = rf"(?:{ANY})/actions/runners"
RUNS = rf"{REPO}/actions/runs"
ID = r"/(?P<id>\d+)"
ROUTES: tuple[tuple[str, str, str, Callable[[Call], Answer]], ...] = (
    ("GET", RUNNERS, "runners:read", list_runners),
    ("GET", f"{RUNNERS}{ID}", "runners:read", get_runner),
    ("DELETE", f"{RUNNERS}{ID}", "runners:write", delete_runner),
    ("GET", f"{RUNNERS}/downloads", "runners:read", list_downloads),
    ("GET", f"{RUNNERS}/deprecations/(?P<id>[^/]+)", "runners:read", deprecation),
    ("POST", f"{RUNNERS}/generate-jitconfig", "runners:write", jit),
    ("POST", f"{RUNNERS}/(?P<what>registration|remove)-token", "runners:write", runner_token),
    ("GET", rf"{MANY}/actions/runner-groups", "runners:read", list_groups),
    ("GET", r"/repos/actions/runner/releases/latest", "", latest_release),
    ("GET", RUNS, "actions:read", list_runs),
    ("GET", f"{RUNS}{ID}", "actions:read", get_run),
    ("GET", rf"{RUNS}{ID}(?:/attempts/(?P<attempt>\d+))?/jobs", "actions:read", list_jobs),
    ("POST", f"{RUNS}{ID}/rerun", "actions:write", rerun),
    ("POST", f"{RUNS}{ID}/rerun-failed-jobs", "actions:write", rerun_failed),
    ("POST", f"{RUNS}{ID}/(?:force-)?cancel", "actions:write", cancel),
    ("GET", f"{REPO}/actions/jobs{ID}", "actions:read", get_job),
    ("POST", f"{REPO}/actions/jobs{ID}/rerun", "actions:write", rerun_job),
    ("GET", f"{REPO}/check-runs{ID}/annotations", "checks:read", list_annotations),
    ("GET", REPO, "metadata:read", get_repository),
    ("GET", rf"(?:{REPO}|/(?P<kind2>orgs)/(?P<name2>[^/]+))/installation", "jwt", get_installation),
    ("POST", rf"/app/installations{ID}/access_tokens", "jwt", installation_token),
    ("GET", r"/app", "jwt", get_app),
    ("GET", r"/user", "user:read", get_user),
    ("GET", r"/rate_limit", "", rate_limit),
    ("GET", r"/meta", "", meta),
)


def answer(call: Call) -> Answer:
    """Do what a request asks for; raise Refused."""
    call.caller = identify(call.gh, call.authorization)
    for method, pattern, need, act in ROUTES:
        match = re.fullmatch(pattern, call.path) if method == call.method else None
        if match:
            call.parts = {key: value for key, value in match.groupdict().items() if value}
            kind = call.parts.get("kind") or call.parts.get("kind2")
            if kind:
                name = call.parts.get("name") or call.parts["name2"]
                call.place = call.gh.place(kind, name)
            allow(call, need)
            with call.gh.changed:
                call.gh.sweep()
                return act(call)
    raise Refused(404, "Not Found")
