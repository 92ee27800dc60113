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


def test_elsewhere_nothing_is_written() -> None:
    ci.report(FIELDS, {})
