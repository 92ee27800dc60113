"""README.md tells all that there is, and neither it nor the pages below tell what isn't."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import pytest

from cml_runner import clouds, errors
from cml_runner.cli import COMMANDS, cli
from cml_runner.launch.options import Options

if TYPE_CHECKING:
    from tests.conftest import Cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / ".github" / "docs"
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


PAGES = ["README.md", *sorted(str(one.relative_to(ROOT)) for one in DOCS.glob("*.md"))]
DESIGN = DOCS / "design"
INDEX = DESIGN / "README.md"
TOPICS = sorted(page for page in DESIGN.glob("*.md") if page != INDEX)
OTHERS = [
    *(f".github/{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "PULL_REQUEST_TEMPLATE")),
    *(str(page.relative_to(ROOT)) for page in [INDEX, *TOPICS]),
]


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text()


@cache
def tables() -> list[list[str]]:
    """The rows of all tables, split into cells."""
    lines = [line for line in readme().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def spans(text: str) -> list[str]:
    """The pieces of code in a text."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def invocations(page: str) -> list[list[str]]:
    """The words which follow our program's name in every piece of code, line by line."""
    text = (ROOT / page).read_text()
    code = [*FENCED.findall(text), *spans(text)]
    found = re.findall(r"cml-runner +([a-z-][^\n#&|;>)\"]*)", "\n".join(code))
    return [line.split() for line in found]


@cache
def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command
        inner = command.commands if isinstance(command, click.Group) else {}
        found[name] = command
        found |= {f"{name} {word}": one for word, one in inner.items()}
    return found


def options(name: str) -> list[click.Option]:
    return [one for one in commands()[name].params if isinstance(one, click.Option)]


def flags(name: str) -> set[str]:
    return {flag for one in options(name) for flag in (*one.opts, *one.secondary_opts)}


def kinds() -> list[type[errors.RunnerError]]:
    found = [one for one in vars(errors).values() if isinstance(one, type)]
    ours = [one for one in found if issubclass(one, errors.RunnerError)]
    return [one for one in ours if "exit_code" in vars(one)]  # others share that of their kind


def test_there_are_commands() -> None:
    assert {name.partition(" ")[0] for name in commands()} == COMMANDS.keys()
    assert len(commands()) > len(COMMANDS)


@pytest.mark.parametrize("name", commands())
def test_every_command_and_option_has_help(name: str) -> None:
    assert commands()[name].help
    assert [one.name for one in options(name) if not one.help] == []


@pytest.mark.parametrize("name", commands())
def test_every_command_and_option_is_in_the_readme(name: str) -> None:
    known = {flag for row in tables() for span in spans(" ".join(row)) for flag in span.split()}
    assert sorted(flags(name) - known) == []
    assert known.issuperset(name.split()) or f"### {name}\n" in readme()


# Options of other programs, and those of CML and Terraform that aren't ours.
THEIRS = {
    *("--query", "--output-file", "--set", "--tunnel-through-iap", "--role", "--member", "--file"),
    *(
        "-g",
        "--project",
        "--condition",
        "--scope",
        "--assignee",
        "--namespace",
        "--role-definition",
    ),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_exists(page: str) -> None:
    existing = {"--help", "--version"}.union(*map(flags, commands()))
    told = {flag for span in spans((ROOT / page).read_text()) for flag in FLAG.findall(span)}
    assert sorted(told - existing - (THEIRS if page != "README.md" else set())) == []


def test_the_readme_has_most_options() -> None:
    told = {flag for span in spans(readme()) for flag in FLAG.findall(span)}
    assert len(told) > 50


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_valid(page: str) -> None:
    for words in invocations(page):
        if words[0] in ("--version", "--help"):
            continue
        name = " ".join(words[:2]) if words[0] == "task" else words[0]
        assert name in commands(), words
        ours = words[: words.index("--")] if "--" in words else words
        given = {word.partition("=")[0] for word in ours if FLAG.match(word)}
        assert given <= flags(name) | {"--help"}, words
        for flag, value in itertools.pairwise(ours):
            if flag == "--cloud" and value.isalpha() and value.islower():
                assert value in (*clouds.NAMES, *clouds.ALIASES), words


def test_there_are_command_lines() -> None:
    assert len(invocations("README.md")) > 5
    assert sum(len(invocations(page)) for page in PAGES) > 50


def test_defaults_are_those_in_the_readme() -> None:
    rows = reversed(tables())  # the first table with a flag is that of launch
    told = {flag: row[1] for row in rows for flag in spans(row[0]) if len(row) == 3}
    defaults = {one.opts[0]: one.default for one in options("launch")}
    shown = {flag: default for flag, default in defaults.items() if isinstance(default, str)}
    assert {flag: told[flag] for flag, default in shown.items() if default} == {
        flag: default for flag, default in shown.items() if default
    }


def test_options_of_launch_are_those_of_the_command() -> None:
    """Who calls launch from Python and who calls it from a shell gets the same."""
    command = commands()["launch"]
    context = click.Context(command)
    values = {
        str(one.name): one.process_value(context, one.get_default(context))
        for one in command.params
        if one.expose_value and one.name != "output"
    }
    assert values == asdict(Options())


def test_exit_codes_in_the_readme() -> None:
    rows = {row[0]: row[1].partition(":")[0] for row in tables() if row[0].isdigit()}
    assert rows.pop("0")
    assert rows == {str(kind.exit_code): kind.__name__ for kind in kinds()}
    assert len(rows) == len(kinds()), "two kinds of error have the same code"


@pytest.mark.parametrize("kind", kinds())
def test_exit_codes_elsewhere(kind: type[errors.RunnerError]) -> None:
    assert re.search(rf"\b{kind.exit_code} [a-z]", cli.help or "")
    if kind is not errors.RunnerError:
        assert re.search(rf"── {kind.__name__} +{kind.exit_code} ", errors.__doc__ or "")


@pytest.mark.parametrize("name", [*PAGES, *OTHERS])
def test_links_lead_somewhere(name: str) -> None:
    file = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", file.read_text())
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_every_page_is_linked_from_the_readme_or_a_page_that_is() -> None:
    seen, left = set(), ["README.md"]
    while left:
        page = left.pop()
        seen.add(page)
        text = (ROOT / page).read_text()
        for link in re.findall(r"\]\(([^)#:]+\.md)", text):
            found = str(((ROOT / page).parent / link).resolve().relative_to(ROOT))
            if found in PAGES and found not in seen:
                left.append(found)
    assert sorted(set(PAGES) - seen) == []


def test_nobody_is_told_to_install_what_is_not_there() -> None:
    """The name on the package index isn't in use yet, so an address must follow it."""
    others = (*(ROOT / "actions").rglob("*.yml"), *(ROOT / ".github" / "examples").glob("*.yml"))
    places = [ROOT / "README.md", *DOCS.glob("*.md"), *others]
    told = [
        line.strip()
        for place in places
        for line in place.read_text().splitlines()
        for name in re.findall(r"install [^`&]*?cml-runner(?:\[[^]]*\])?['\"]?( @ )?", line)
        if not name
    ]
    assert told == []


def blocks(page: str) -> list[tuple[str, str]]:
    """The commands of a page, each block with the mark above it, or none."""
    text = (ROOT / page).read_text()
    found = re.findall(
        r"(?:^<!-- ([^\n]*) -->\n)?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    return [(mark, lines) for mark, lines in found if "cml-runner" in lines]


RUN = [lines for page in PAGES for mark, lines in blocks(page) if not mark]
MAIN = """\
resource "iterative_task" "train" {
  cloud = "aws"
  machine = "m"
  script = "#!/bin/sh\\ntrue"
}
"""


def test_what_is_not_run_here_needs_an_account_or_is_run_by_ci() -> None:
    marks = {mark for page in PAGES for mark, _ in blocks(page)}
    assert marks == {"", "demo", "needs a network", "needs an account"}
    assert len(RUN) > 1


@pytest.mark.parametrize("lines", RUN)
def test_commands_that_need_no_account(home: Path, cli: Cli, tmp_path: Path, lines: str) -> None:
    assert home
    program = tmp_path / "bin" / "cml-runner"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cml_runner "$@"\n')
    program.chmod(0o755)
    (tmp_path / "main.tf").write_text(MAIN)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines.replace("/tmp/", f"{tmp_path}/tmp/")],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(cli.run("list", "--output", "json").out) == []


class Decision(NamedTuple):
    """An entry of a design page."""

    number: int
    title: str
    page: str
    text: str


@cache
def decisions() -> list[Decision]:
    return [
        Decision(int(number), title, page.name, text.strip("\n"))
        for page in TOPICS
        for number, title, text in re.findall(
            r"^## (\d+)\. ([^\n]+)\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
        )
    ]


def test_design_decisions_are_numbered_once_for_all() -> None:
    numbers = sorted(decision.number for decision in decisions())
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 70


def test_every_design_decision_is_in_the_index_once() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \| \[.+\]\((.+)\) \|$", INDEX.read_text(), re.MULTILINE)
    expected = [(str(number), title, page) for number, title, page, _ in sorted(decisions())]
    assert rows == expected


@pytest.mark.parametrize("page", TOPICS, ids=lambda page: page.stem)
def test_all_headings_of_a_design_page_are_decisions(page: Path) -> None:
    count = sum(decision.page == page.name for decision in decisions())
    assert count == len(re.findall(r"^##", page.read_text(), re.MULTILINE)) > 0


@pytest.mark.parametrize("decision", decisions(), ids=lambda decision: decision.number)
def test_a_design_decision_is_short(decision: Decision) -> None:
    lines = decision.text.splitlines()
    assert len(lines) <= 10
    assert [line for line in lines if len(line) > 110] == []
    parts = [line.split(":")[0] for line in lines if line.startswith("- ")]
    assert parts == ["- Context", "- Decision", "- Consequence"]


def test_every_decision_that_the_code_cites_exists() -> None:
    code = [*(ROOT / "cml_runner").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    cited = {
        int(number)
        for file in code
        for number in re.findall(r"#[^\n]*\bdesign (\d+)", file.read_text())
    }
    assert cited
    assert cited - {decision.number for decision in decisions()} == set()


def test_contributing_is_one_page() -> None:
    assert len((ROOT / ".github" / "CONTRIBUTING.md").read_text().split()) <= 900


def test_hooks_are_checks_of_ci() -> None:
    hooks = (ROOT / ".github" / "pre-commit.yaml").read_text()
    entries = re.findall(r"entry: (.+)", hooks)
    checks = (ROOT / ".ci" / "run").read_text()
    assert [entry for entry in entries if f" {entry} ||" not in checks] == []
    for check in re.findall(r"^ {4}(\.venv/bin/\S+.*) \|\| failed=1", checks, re.MULTILINE):
        assert check in entries
