"""How GitHub writes what the fake knows as JSON; the official description has every field."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from tests.lab.github_state import READ_ONLY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.lab.github_state import App, Job, Place, Run, Runner

LINKS = (
    "archive assignees blobs branches collaborators comments commits compare contents contributors "
    "deployments downloads events forks git_commits git_refs git_tags hooks issue_comment "
    "issue_events issues keys labels languages merges milestones notifications pulls releases "
    "stargazers statuses subscribers subscription tags teams trees"
)
USER_LINKS = (
    "followers following gists starred subscriptions organizations repos events received_events"
)
COUNTS = (
    "forks_count stargazers_count watchers_count size open_issues_count forks open_issues "
    "watchers subscribers_count network_count"
)
FEATURES = "issues projects wiki pages discussions"
RUN_LINKS = "jobs logs artifacts cancel rerun"
NO_WORDS = "name company location email hireable bio"
NO_NUMBERS = (
    "public_repos public_gists followers following collaborators disk_usage owned_private_repos "
    "private_gists total_private_repos"
)
NO_SUM = "0" * 64  # of platforms that nobody has here
SHA = "5f1d7a84db00d2fce00b31a7fc73224f9f4b4a3c"
PLATFORMS = (
    ("osx", "x64"),
    ("osx", "arm64"),
    ("linux", "x64"),
    ("linux", "arm"),
    ("linux", "arm64"),
    ("win", "x64"),
    ("win", "arm64"),
)


@dataclass(frozen=True)
class Address:
    """Where the client found us, so that every URL in an answer leads back here."""

    html: str
    api: str


def moment(seconds: float) -> str:
    """Write a time as GitHub does."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def node(number: int) -> str:
    return base64.b64encode(f"0:{number}".encode()).decode()


def account(at: Address, login: str, kind: str = "User") -> dict[str, Any]:
    url = f"{at.api}/users/{login}"
    number = sum(login.encode())
    return {
        **{f"{name}_url": f"{url}/{name}" for name in USER_LINKS.split()},
        "login": login,
        "id": number,
        "node_id": node(number),
        "avatar_url": f"{at.html}/{login}.png",
        "gravatar_id": "",
        "url": url,
        "html_url": f"{at.html}/{login}",
        "type": kind,
        "site_admin": False,
    }


def me(at: Address, login: str) -> dict[str, Any]:
    """Write the user whose token it is."""
    dates = {"created_at": moment(0), "updated_at": moment(0)}
    return {
        **account(at, login),
        **dict.fromkeys(NO_WORDS.split()),
        **dict.fromkeys(NO_NUMBERS.split(), 0),
        **dates,
        "blog": "",
        "two_factor_authentication": True,
        "user_view_type": "private",
    }


def repository(at: Address, place: Place, owner_kind: str) -> dict[str, Any]:
    """Write the part that every mention of a repository has."""
    url = f"{at.api}/repos/{place.name}"
    return {
        **{f"{name}_url": f"{url}/{name}" for name in LINKS.split()},
        "id": place.id,
        "node_id": node(place.id),
        "name": place.name.partition("/")[2],
        "full_name": place.name,
        "owner": account(at, place.owner, owner_kind),
        "private": place.private,
        "html_url": f"{at.html}/{place.name}",
        "description": None,
        "fork": False,
        "url": url,
    }


def full_repository(at: Address, place: Place, owner_kind: str, role: str) -> dict[str, Any]:
    url = f"{at.html}/{place.name}"
    levels = ("pull", "triage", "push", "maintain", "admin")
    granted = {"read": 1, "write": 3, "admin": 5}[role]
    return {
        **repository(at, place, owner_kind),
        **dict.fromkeys(COUNTS.split(), 0),
        **{f"has_{name}": False for name in FEATURES.split()},
        **dict.fromkeys(("mirror_url", "homepage", "language", "license")),
        "clone_url": f"{url}.git",
        "git_url": f"git:{url.partition(':')[2]}.git",
        "ssh_url": f"git@127.0.0.1:{place.name}.git",
        "svn_url": url,
        "default_branch": "main",
        "archived": False,
        "disabled": False,
        "visibility": "private" if place.private else "public",
        "pushed_at": moment(0),
        "created_at": moment(0),
        "updated_at": moment(0),
        "permissions": {level: index < granted for index, level in enumerate(levels)},
    }


def label(name: str) -> dict[str, Any]:
    kind = "read-only" if name.lower() in READ_ONLY else "custom"
    return {"id": sum(name.encode()), "name": name, "type": kind}


def runner(one: Runner) -> dict[str, Any]:
    return {
        "id": one.id,
        "name": one.name,
        "os": one.os,
        "status": "online" if one.online else "offline",
        "busy": one.busy,
        "ephemeral": one.ephemeral,
        "runner_group_id": one.group,
        "labels": [label(name) for name in one.labels],
        "version": one.version,
    }


def group(at: Address, place: Place, number: int) -> dict[str, Any]:
    url = f"{at.api}/{place.kind}/{place.name}/actions/runner-groups/{number}"
    inherited = {"inherited": False} if place.kind == "orgs" else {}
    return {
        **inherited,
        "id": number,
        "name": place.groups[number],
        "visibility": "all",
        "default": number == 1,
        "runners_url": f"{url}/runners",
        "allows_public_repositories": False,
        "restricted_to_workflows": False,
        "selected_workflows": [],
        "workflow_restrictions_read_only": False,
    }


def notes(at: Address, one: Job) -> list[dict[str, Any]]:
    """What people read beside the result of a job that ended in an unusual way."""
    note = {
        "path": ".github",
        "start_line": 1,
        "end_line": 1,
        "start_column": None,
        "end_column": None,
        "annotation_level": "failure",
        "title": "",
        "message": one.message,
        "raw_details": "",
        "blob_href": f"{at.html}/{one.run.repository.name}/blob/{SHA}/.github",
    }
    return [note] if one.message else []


def job(at: Address, one: Job) -> dict[str, Any]:
    repo = f"{at.api}/repos/{one.run.repository.name}"
    html = f"{at.html}/{one.run.repository.name}/actions/runs/{one.run.id}/job/{one.id}"
    taken = one.status in ("in_progress", "completed") and one.runner_id is not None
    groups = one.run.repository.groups
    return {
        "id": one.id,
        "run_id": one.run.id,
        "run_url": f"{repo}/actions/runs/{one.run.id}",
        "run_attempt": one.attempt,
        "node_id": node(one.id),
        "head_sha": SHA,
        "head_branch": "main",
        "url": f"{repo}/actions/jobs/{one.id}",
        "html_url": html,
        "status": one.status,
        "conclusion": one.conclusion,
        "created_at": moment(one.created),
        "started_at": moment(one.started or one.created),
        "completed_at": None if one.completed is None else moment(one.completed),
        "name": one.name,
        "steps": [],
        "check_run_url": f"{repo}/check-runs/{one.id}",
        "labels": list(one.description.labels),
        "runner_id": one.runner_id if taken else None,
        "runner_name": one.runner_name if taken else None,
        "runner_group_id": one.runner_group if taken else None,
        "runner_group_name": groups.get(one.runner_group or 1, "Default") if taken else None,
        "workflow_name": one.run.name,
    }


def run(at: Address, one: Run, owner_kind: str) -> dict[str, Any]:
    repo = f"{at.api}/repos/{one.repository.name}"
    url = f"{repo}/actions/runs/{one.id}"
    person = {"name": "Mona", "email": "mona@example.com"}
    commit = {"id": SHA, "tree_id": SHA, "message": "Train", "timestamp": moment(one.created)}
    where = repository(at, one.repository, owner_kind)
    before = f"{url}/attempts/{one.attempt - 1}" if one.attempt > 1 else None
    return {
        **{f"{name}_url": f"{url}/{name}" for name in RUN_LINKS.split()},
        "id": one.id,
        "name": one.name,
        "node_id": node(one.id),
        "check_suite_id": one.id,
        "check_suite_node_id": node(one.id),
        "check_suite_url": f"{repo}/check-suites/{one.id}",
        "head_branch": "main",
        "head_sha": SHA,
        "path": ".github/workflows/ci.yml",
        "run_number": one.id,
        "run_attempt": one.attempt,
        "event": "push",
        "display_title": "Train",
        "status": one.status,
        "conclusion": one.conclusion,
        "workflow_id": 1,
        "workflow_url": f"{repo}/actions/workflows/1",
        "url": url,
        "html_url": f"{at.html}/{one.repository.name}/actions/runs/{one.id}",
        "pull_requests": [],
        "created_at": moment(one.created),
        "updated_at": moment(one.created),
        "run_started_at": moment(one.created),
        "previous_attempt_url": before,
        "actor": account(at, "mona"),
        "triggering_actor": account(at, "mona"),
        "head_commit": {**commit, "author": person, "committer": person},
        "repository": where,
        "head_repository": where,
    }


def installation(at: Address, app: App, owner: str, owner_kind: str) -> dict[str, Any]:
    number = sum(owner.encode())
    return {
        "id": number,
        "account": account(at, owner, owner_kind),
        "repository_selection": "all",
        "access_tokens_url": f"{at.api}/app/installations/{number}/access_tokens",
        "repositories_url": f"{at.api}/installation/repositories",
        "html_url": f"{at.html}/settings/installations/{number}",
        "app_id": app.id,
        "app_slug": "cml",
        "target_id": number,
        "target_type": owner_kind,
        "permissions": dict(app.permissions),
        "events": [],
        "created_at": moment(0),
        "updated_at": moment(0),
        "single_file_name": None,
        "suspended_by": None,
        "suspended_at": None,
    }


def application(at: Address, app: App) -> dict[str, Any]:
    return {
        "id": app.id,
        "slug": "cml",
        "client_id": app.client_id,
        "node_id": node(app.id),
        "owner": account(at, "mona"),
        "name": "CML",
        "description": None,
        "external_url": at.html,
        "html_url": f"{at.html}/apps/cml",
        "created_at": moment(0),
        "updated_at": moment(0),
        "permissions": dict(app.permissions),
        "events": [],
    }


def downloads(at: Address, version: str, sums: Mapping[str, str]) -> list[dict[str, Any]]:
    """Write the list of the runner program's packages, one per platform."""
    found = []
    for system, arch in PLATFORMS:
        name = f"actions-runner-{system}-{arch}-{version}.{'zip' if system == 'win' else 'tar.gz'}"
        package = {"os": system, "architecture": arch, "filename": name}
        url = f"{at.html}/_downloads/{version}/{name}"
        checksum = sums.get(f"{system}-{arch}", NO_SUM)
        found.append({**package, "download_url": url, "sha256_checksum": checksum})
    return found


def release(at: Address, version: str, sums: Mapping[str, str]) -> dict[str, Any]:
    url = f"{at.api}/repos/actions/runner/releases"
    names = [f"{system}-{arch}" for system, arch in PLATFORMS]
    shown = [(name, sums.get(name, NO_SUM)) for name in names]
    lines = [f"<!-- BEGIN SHA {name} -->{one}<!-- END SHA {name} -->" for name, one in shown]
    return {
        "id": 1,
        "node_id": node(1),
        "tag_name": f"v{version}",
        "target_commitish": SHA,
        "name": f"v{version}",
        "body": "\n".join(["## SHA-256 Checksums", *(f"- {line}" for line in lines)]),
        "draft": False,
        "prerelease": False,
        "created_at": moment(0),
        "published_at": moment(0),
        "author": account(at, "github-actions[bot]", "Bot"),
        "assets": [_asset(at, one) for one in downloads(at, version, sums)],
        "url": f"{url}/1",
        "html_url": f"{at.html}/actions/runner/releases/tag/v{version}",
        "assets_url": f"{url}/1/assets",
        "upload_url": f"{url}/1/assets{{?name,label}}",
        "tarball_url": f"{at.api}/repos/actions/runner/tarball/v{version}",
        "zipball_url": f"{at.api}/repos/actions/runner/zipball/v{version}",
    }


def _asset(at: Address, package: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": 1,
        "node_id": node(1),
        "name": package["filename"],
        "label": "",
        "content_type": "application/gzip",
        "size": 1,
        "digest": f"sha256:{package['sha256_checksum']}",
        "state": "uploaded",
        "download_count": 0,
        "uploader": account(at, "github-actions[bot]", "Bot"),
        "browser_download_url": package["download_url"],
        "url": f"{at.api}/repos/actions/runner/releases/assets/1",
        "created_at": moment(0),
        "updated_at": moment(0),
    }
