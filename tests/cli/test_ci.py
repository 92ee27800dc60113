from __future__ import annotations

from typing import TYPE_CHECKING

from cml_runner.cli import ci

if TYPE_CHECKING:
    from pathlib import Path

FIELDS = {
    "name": "gpu",
    "id": "cml-gpu",
    "cloud": "local",
    "region": "us-west",
    "instanceType": "m",
    "spot": True,
    "labels": "a|b",
    "repo": "r",
    "expires": None,
    "metadata": {"note": "two\nlines"},
    "odd": "x\nother=1",
}


def test_outputs_and_summary(tmp_path: Path) -> None:
    output, summary = tmp_path / "output", tmp_path / "summary"
    output.write_text("before=1\n")
    ci.report(FIELDS, {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)})
    assert parsed(output.read_text()) == {
        "before": "1",
        "name": "gpu",
        "id": "cml-gpu",
        "cloud": "local",
        "region": "us-west",
        "instanceType": "m",
        "spot": "true",
        "labels": "a|b",
        "repo": "r",
        "expires": "null",
        "metadata": '{"note": "two\\nlines"}',
        "odd": "x\nother=1",
    }
    assert "| labels | a\\|b |" in summary.read_text()


def parsed(text: str) -> dict[str, str]:
    """Read a step's outputs as GitHub does."""
    lines = iter(text.splitlines())
    found = {}
    for line in lines:
        key, heredoc, end = line.partition("<<")
        if heredoc:
            values = []
            while (value := next(lines)) != end:
                values.append(value)
            found[key] = "\n".join(values)
        else:
            key, _, found[line.partition("=")[0]] = line.partition("=")
    return found


def test_variables_for_later_jobs(tmp_path: Path) -> None:
    other = tmp_path / "other"
    gitlab = {"GITLAB_CI": "true", "CI_PROJECT_DIR": str(tmp_path)}
    ci.report(FIELDS, {**gitlab, "BITBUCKET_PIPELINES_VARIABLES_PATH": str(other)})
    text = (tmp_path / "cml-runner.env").read_text()
    assert text.splitlines() == [
        "CML_LAUNCHED_ID=cml-gpu",
        "CML_LAUNCHED_NAME=gpu",
        "CML_LAUNCHED_CLOUD=local",
        "CML_LAUNCHED_REGION=us-west",
        "CML_LAUNCHED_LABELS=a|b",
    ]
    assert other.read_text() == text


def test_elsewhere_nothing_is_written() -> None:
    ci.report(FIELDS, {})
