"""Which files are left out: rules as rclone and terraform-provider-iterative have them, or git."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathspec import GitIgnoreSpec

USUAL = (
    *("/main.tf", "/terraform.tfstate*", ".terraform*"),  # as terraform-provider-iterative
    *("/.cml-runner/", ".cml-runner-part-*/"),  # our own
)


class Rules:
    """What is left out of a directory.

    A rule is a path or glob relative to the directory ("data/raw", "*.tmp" at the top); or one of
    rclone's, "- GLOB" or "+ GLOB", which hold at any depth unless they begin with a slash, and
    of which the first that fits decides; or "@FILE", a file of rules as in .gitignore. What is in
    a directory that is left out is left out, too.

    Raises ConfigurationError with every mistake.
    """

    def __init__(self, rules: Sequence[str] = ()) -> None:
        lines: list[str] = []
        mistakes: list[str] = []
        for rule in rules:
            try:
                lines = [*_lines(rule), *lines]  # in git, the last one decides
            except ValueError as error:
                mistakes.append(f"--exclude {rule}: {error}")
        if mistakes:
            raise ConfigurationError(*mistakes)
        self.lines: tuple[str, ...] = (*USUAL, *lines)

    @classmethod
    def of(cls, lines: Sequence[str]) -> Rules:
        """Make the same again from its lines."""
        found = cls()
        found.lines = tuple(lines)
        return found

    def exclude(self, path: bytes, *, directory: bool) -> bool:
        """Say if a file or directory is left out."""
        text = os.fsdecode(path).replace("\n", "\ufffd")  # in patterns, a line is a line
        return self._spec.match_file(f"{text}/" if directory else text)

    @cached_property
    def _spec(self) -> GitIgnoreSpec:
        from pathspec import GitIgnoreSpec  # noqa: PLC0415 - not needed by most of what we do

        return GitIgnoreSpec.from_lines(self.lines)


def _lines(rule: str) -> list[str]:
    """Say the same in git's words."""
    if rule.startswith("@"):
        try:
            return Path(rule[1:]).expanduser().read_text().splitlines()
        except OSError as error:
            raise ValueError(error.strerror) from error
    if "{{" in rule:
        msg = "regular expressions are not understood"
        raise ValueError(msg)
    sign, glob = ("-", rule) if rule[:2] not in ("- ", "+ ") else (rule[0], rule[2:].strip())
    if not glob.strip("/"):
        msg = "nothing is named"
        raise ValueError(msg)
    if rule[:2] not in ("- ", "+ ") or glob.startswith("/"):
        glob = "/" + glob.removeprefix("./").lstrip("/")
    elif "/" in glob.rstrip("/"):
        glob = "**/" + glob
    # Its ** also goes with other characters; git has it between slashes only.
    globs = [re.sub(r"(?<=[^/*])\*\*|\*\*(?![/*]|$)", "*", one) for one in _alternatives(glob)]
    return [("!" if sign == "+" else "") + _literal(one) for one in globs]


def _literal(glob: str) -> str:
    """Keep what is special in git, but not in a glob, from being so."""
    glob = re.sub(r" +$", lambda spaces: "\\ " * len(spaces[0]), glob)
    return "\\" + glob if glob[0] in "#!" else glob


def _alternatives(glob: str) -> list[str]:
    """Write a{b,c} as ab and ac."""
    if not (match := re.search(r"\{([^{}]*)\}", glob)):
        return [glob]
    before, after = glob[: match.start()], glob[match.end() :]
    return [one for part in match[1].split(",") for one in _alternatives(before + part + after)]
