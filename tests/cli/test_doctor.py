"""The command that looks at everything first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conftest import Cli

DOCS = Path(__file__).parents[2] / ".github" / "docs"
FIELDS = {"place", "what", "state", "message", "hint", "code"}


def test_all_is_well_on_the_embedded_forge_and_cloud(cli: Cli, tmp_path: Path) -> None:
    repo = f"file://{tmp_path}"
    done = cli.run("doctor", "--repo", repo, "--cloud", "local", "--output", "json")
    assert {row["place"] for row in done.json} == {repo, "local us-west"}
    assert all(row.keys() == FIELDS for row in done.json)
    assert {row["state"] for row in done.json} == {"ok"}


def test_a_failure_is_the_exit_code_and_hides_nothing(cli: Cli, tmp_path: Path) -> None:
    repo = f"file://{tmp_path}/nowhere"
    done = cli.run("doctor", "--repo", repo, "--cloud", "local", code=4)
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [row[1] for row in rows if row[2] == "failed"] == ["directory"]
    assert f"mkdir -p {tmp_path}/nowhere" in done.out
    assert ["local us-west", "login", "ok"] in [row[:3] for row in rows]


def test_clouds_without_credentials_are_passed_over_unless_one_asks(cli: Cli) -> None:
    done = cli.run("doctor", "--output", "json")
    assert {row["place"] for row in json.loads(done.out)} == {"local us-west"}
    done = cli.run("doctor", "--cloud", "aws", "--output", "json", code=3)
    (row,) = done.json
    assert (row["what"], row["state"], row["code"]) == ("login", "failed", 3)


def test_options_that_make_no_sense(cli: Cli) -> None:
    assert "--count" in cli.run("doctor", "--count", "many", code=2).err


def test_the_page_about_it_shows_what_is_printed(cli: Cli, tmp_path: Path) -> None:
    shown = re.search(
        r"<!-- sample -->\n```\n(.*?)```", (DOCS / "doctor.md").read_text(), re.DOTALL
    )
    assert shown
    done = cli.run("doctor", "--repo", f"file://{tmp_path}/forge", "--cloud", "local", code=4)
    words = [line.split("\t")[:3] for line in done.out.splitlines()]
    told = [re.split(r" {2,}", line)[:3] for line in shown[1].splitlines()]
    assert [row[1:] for row in told] == [row[1:] for row in words]
