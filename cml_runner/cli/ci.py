"""Tell the CI job that launched a runner what became of it, in the CI's own ways."""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

DOTENV = "cml-runner.env"
PREFIX = "CML_LAUNCHED_"  # CML_RUNNER_ would be options for the next one
SHOWN = ("name", "id", "cloud", "region", "instanceType", "spot", "labels", "repo", "expires")


def report(fields: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Write a GitHub step's outputs and summary, a GitLab job's or Bitbucket step's variables."""
    _put_out(fields, environment)
    if state := environment.get("GITHUB_STATE"):  # for the end of the job
        _append(state, "".join(_output(key, fields[key]) for key in ("id", "region")))
    if summary := environment.get("GITHUB_STEP_SUMMARY"):
        rows = "".join(f"| {key} | {_cell(fields[key])} |\n" for key in SHOWN)
        _append(summary, f"### cml-runner\n\n| | |\n| --- | --- |\n{rows}\n")
    for path in _dotenvs(environment):
        told = ("id", "name", "cloud", "region", "labels")
        _append(path, "".join(f"{PREFIX}{key.upper()}={_line(fields[key])}\n" for key in told))


def report_recovery(fields: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Tell later steps of a GitHub job what was run again, and people in its summary."""
    _put_out(fields, environment)
    summary = environment.get("GITHUB_STEP_SUMMARY")
    if summary and fields["jobs"]:
        rows = "".join(
            f"| {_linked(job['name'], job['url'])} | {_cell(job['state'])} "
            f"| {_cell(job['runner'])} | {_cell(job['reason'])} |\n"
            for job in fields["jobs"]
        )
        head = "| job | | runner | |\n| --- | --- | --- | --- |\n"
        _append(summary, f"### cml-runner: interrupted jobs\n\n{head}{rows}\n")


def _put_out(fields: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    if output := environment.get("GITHUB_OUTPUT"):
        _append(output, "".join(_output(key, value) for key, value in fields.items()))


def _linked(text: str, url: str) -> str:
    plain = _cell(text).replace("[", "\\[").replace("]", "\\]")
    return f"[{plain}]({url})" if url else plain


def _dotenvs(environment: Mapping[str, str]) -> list[str]:
    """Find the files whose variables later jobs get: as KEY=VALUE, one on a line.

    https://docs.gitlab.com/ci/yaml/artifacts_reports/#artifactsreportsdotenv
    https://support.atlassian.com/bitbucket-cloud/docs/variables-and-secrets/
    """
    found = []
    if "GITLAB_CI" in environment:
        found.append(str(Path(environment.get("CI_PROJECT_DIR", "."), DOTENV)))
    if path := environment.get("BITBUCKET_PIPELINES_VARIABLES_PATH"):
        found.append(path)
    return found


def _output(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    end = f"end-{secrets.token_hex(8)}"  # a value can't contain what nobody knows
    return f"{key}<<{end}\n{text}\n{end}\n"


def _cell(value: Any) -> str:
    return _line(value).replace("|", "\\|")


def _line(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\n", " ")


def _append(path: str, text: str) -> None:
    """Add to a file; a launch that succeeded doesn't fail for want of it."""
    try:
        with Path(path).open("a") as file:
            file.write(text)
    except OSError as error:
        log.warning("can't write %s: %s", path, error.strerror)
