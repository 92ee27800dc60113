from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.transfer import Rules

if TYPE_CHECKING:
    from pathlib import Path


def excluded(rules: tuple[str, ...], path: str) -> bool:
    """Whether a walk would leave it out: a directory hides what is in it."""
    found = Rules(rules)
    parts = path.rstrip("/").split("/")
    above = ["/".join(parts[:number]) for number in range(1, len(parts))]
    if any(found.exclude(one.encode(), directory=True) for one in above):
        return True
    return found.exclude(path.rstrip("/").encode(), directory=path.endswith("/"))


@pytest.mark.parametrize(
    ("rules", "out", "kept"),
    [
        ((), ("main.tf", "terraform.tfstate.backup", ".terraform/x"), ("a", "sub/main.tf")),
        ((), (".cml-runner/local/x", ".cml-runner-part-1/x"), (".cml-runner.toml",)),
        (("data",), ("data", "data/x/y"), ("sub/data", "data2")),
        (("./data/*.csv",), ("data/a.csv",), ("data/sub/a.csv", "a.csv")),
        (("*.tmp",), ("a.tmp",), ("sub/a.tmp",)),
        (("- *.tmp",), ("a.tmp", "sub/a.tmp"), ("a.tmp2",)),
        (("- /*.tmp",), ("a.tmp",), ("sub/a.tmp",)),
        (("- cache/",), ("cache/", "sub/cache/x"), ("cache",)),
        (("- a/b",), ("a/b", "sub/a/b"), ("b",)),
        (("- /logs/**",), ("logs/a", "logs/a/b"), ("sub/logs/a",)),
        (("/logs/**.txt",), ("logs/a.txt",), ("logs/a.md",)),
        (("+ keep.tmp", "- *.tmp"), ("a.tmp",), ("keep.tmp",)),
        (("- *.tmp", "+ keep.tmp"), ("a.tmp", "keep.tmp"), ()),
        (("- *.{jpg,png}",), ("a.jpg", "b.png"), ("c.gif",)),
        (("+ main.tf",), (), ("main.tf",)),
        (("- #a",), ("#a",), ("a",)),
        (("+ !a", "- *a"), ("b a",), ("!a",)),
        (("with space",), ("with space",), ("with",)),
    ],
)
def test_rules(rules: tuple[str, ...], out: tuple[str, ...], kept: tuple[str, ...]) -> None:
    assert [path for path in out if not excluded(rules, path)] == []
    assert [path for path in kept if excluded(rules, path)] == []


def test_as_in_gitignore(tmp_path: Path) -> None:
    file = tmp_path / "ignored"
    file.write_text("# builds\n*.o\n!keep.o\n/build/\n")
    rules = (f"@{file}",)
    assert excluded(rules, "sub/a.o")
    assert not excluded(rules, "sub/keep.o")
    assert excluded(rules, "build/x")
    assert not excluded(rules, "sub/build/x")


def test_names_that_are_no_text() -> None:
    rules = Rules(("- *.tmp",))
    assert rules.exclude(b"\xff\xfe.tmp", directory=False)
    assert rules.exclude(b"two\nlines.tmp", directory=False)
    assert not rules.exclude(b"\xff\xfe", directory=False)


def test_every_mistake_is_told() -> None:
    with pytest.raises(ConfigurationError) as error:
        Rules(("fine", "- {{.*}}", "@/nowhere", "- /"))
    assert len(error.value.mistakes) == 3
