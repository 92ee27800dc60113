from __future__ import annotations

import ast
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pkgutil import get_data
from typing import TYPE_CHECKING

import pytest

from cml_runner import bootstrap
from cml_runner.boot.failing import FAILED
from cml_runner.boot.prepare import TOLD
from cml_runner.errors import ConfigurationError
from cml_runner.model import Program

if TYPE_CHECKING:
    from pathlib import Path

LONGEST = "cml-some-repository-of-long-name-aaaaaaaa-bbbbbbbb"
URLS = {
    "aws": f"s3://cml-runner-123456789012-ap-southeast-2/tasks/{LONGEST}?region=ap-southeast-2",
    "azure": f"az://cml-runner/tasks/{LONGEST}?account_name=cml{'0' * 21}"
    f"&msi_resource_id=%2Fsubscriptions%2F{'0' * 36}%2FresourceGroups%2Fcml-runner-southeastasia"
    "%2Fproviders%2FMicrosoft.ManagedIdentity%2FuserAssignedIdentities%2Fcml-runner",
    "gcp": f"gs://cml-runner-{'p' * 30}/tasks/australia-southeast1/{LONGEST}",
}
CLOUDS = tuple(URLS)
URL = f"{URLS['aws']}#aws/ap-southeast-2/{LONGEST}"
INDEX = "https://index.example/simple/"
PROGRAM = Program(wheel=b"wheel", sha256="0123456789abcdef" * 4, index=INDEX)
EXPIRES = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
AUTHORITY = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"


def test_a_ready_machine_just_starts() -> None:
    script = bootstrap.ready("file:///a b", ("python", "-c", "x y"))
    assert script == "#!/bin/sh\nexec python -c 'x y' 'file:///a b'\n"


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("expires", [None, EXPIRES])
@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_every_shell_understands_it(cloud: str, expires: datetime | None, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    program = Program(sha256="1", authorities=AUTHORITY, proxies={"HTTPS_PROXY": "http://a b/$c"})
    script = bootstrap.machine(f"{URLS[cloud]}#{cloud}/r/x", program, expires)
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_it_is_short_even_with_the_longest_names(cloud: str) -> None:
    url = f"{URLS[cloud]}#{cloud}/{'r' * 14}/{LONGEST}"
    assert len(bootstrap.machine(url, PROGRAM, EXPIRES, 1000).encode()) <= 6 * 1024


@pytest.mark.parametrize("cloud", CLOUDS)
def test_stage_0_is_what_its_modules_say_and_python_3_9_understands_it(cloud: str) -> None:
    text = bootstrap.first(cloud)
    tree = ast.parse(text, feature_version=(3, 9))
    functions = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
    assert {"ask", "end", "fetch", "give_up", "put", "main"} <= functions
    assert "cml_runner import" not in text
    assert '"""' not in text
    assert text.endswith("main(*sys.argv[1:])")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_any_python_writes_python_3_9_understands(cloud: str) -> None:
    """From 3.12 on, `ast.unparse` writes strings in an f-string's braces in the same quotes."""
    for name in ("first.py", f"first_{cloud}.py"):
        content = get_data("cml_runner.boot", name)
        assert content
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.FormattedValue):
                inside = [one for one in ast.walk(node.value) if isinstance(one, ast.Constant)]
                assert not [one for one in inside if isinstance(one.value, str)], ast.dump(node)


def test_the_deadline_is_set_first_and_in_utc() -> None:
    script = bootstrap.machine(URL, PROGRAM, EXPIRES)
    assert "OnCalendar=2030-01-02 01:04:05 UTC" in script
    assert str(int(EXPIRES.timestamp())) in script
    assert script.index("OnCalendar") < script.index("python3 -")
    assert "OnCalendar" not in bootstrap.machine(URL, PROGRAM, None)


def test_the_program_is_named_by_its_hash_alone() -> None:
    script = bootstrap.machine(URL, PROGRAM, None, 3)
    (line,) = [line for line in script.splitlines() if line.startswith("python3")]
    assert line == f"python3 -u - '{URL}' {PROGRAM.sha256} --index {INDEX} --count 3 <<'END'"
    assert "cml-runner==" not in script


def test_authorities_and_proxies_that_are_needed_at_once() -> None:
    proxies = {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "169.254.169.254"}
    program = Program(sha256="1", authorities=AUTHORITY, proxies=proxies)
    script = bootstrap.machine(URL, program, None)
    assert f"\n{AUTHORITY}\nEND\n" in script
    export = next(line for line in script.splitlines() if line.startswith("export "))
    assert export.endswith(" HTTPS_PROXY=http://proxy.example:3128 NO_PROXY=169.254.169.254")
    assert script.index("update-ca-trust") < script.index("python3 -")


@pytest.mark.parametrize(
    "program",
    [
        Program(sha256="1", index="https://me:secret@host/x"),
        Program(sha256="1", proxies={"HTTPS_PROXY": "http://me:secret@host"}),
    ],
)
def test_credentials_are_refused(program: Program) -> None:
    with pytest.raises(ConfigurationError, match="no credentials") as caught:
        bootstrap.machine(URL, program, None)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="no credentials"):
        bootstrap.container("/settings", "said:///x", program, "/x.whl")


def test_odd_words_stay_words(tmp_path: Path) -> None:
    odd = Program(sha256="$(touch here)", index="`touch here` 'x")
    script = bootstrap.machine("s3://x/%u $HOME?region=r#aws/r/x", odd, None)
    (line,) = [line for line in script.splitlines() if line.startswith("python3")]
    words = line.removeprefix("python3 -u - ").removesuffix(" <<'END'")
    done = subprocess.run(
        ["sh", "-c", f'printf "%s\\n" {words}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[:4] == [
        "s3://x/%u $HOME?region=r#aws/r/x",
        odd.sha256,
        "--index",
        odd.index,
    ]
    assert not list(tmp_path.iterdir())


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="16384 are allowed"):
        bootstrap.machine(URL, Program(sha256="1", index="https://x/" + "y" * 16384), None)


class Stubs:
    """A place where all that the script calls is a stub which writes down how it was called."""

    def __init__(self, directory: Path, expires: datetime | None, python: str) -> None:
        self.directory, self.calls = directory, directory / "calls"
        tools = directory / "bin"
        tools.mkdir()
        answers = {"python3": python, "date": "echo 1000000000"}
        for name in ("systemctl", "sync", "poweroff", "sleep", "date", "python3", "mkdir"):
            text = f'#!/bin/sh\necho {name} "$@" >>{self.calls}\n{answers.get(name, "")}\n'
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        script = bootstrap.machine(URL, PROGRAM, expires)
        there = {"/var/log": "", "/dev/console": "/console", "/dev/ttyS0": "/no/such/console"}
        for path, place in {**there, "/etc/systemd/system": ""}.items():
            script = script.replace(path, f"{directory}{place}")
        path = f"{tools}:/usr/bin:/bin"
        subprocess.run(["sh"], input=script, text=True, env={"PATH": path}, check=False)

    @property
    def console(self) -> str:
        place = self.directory / "console"
        return place.read_text() if place.exists() else ""


def test_what_can_not_begin_is_told_and_ends_the_machine(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, EXPIRES, "echo no such module; exit 1")
    assert stubs.console == f"{FAILED}: fetching the program\nno such module\n"
    assert "systemctl --force poweroff" in stubs.calls.read_text()


def test_what_was_told_is_not_told_again(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, EXPIRES, f"exit {TOLD}")
    assert stubs.console == ""
    assert "systemctl --force poweroff" in stubs.calls.read_text()


def test_a_machine_that_is_prepared_goes_on(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, EXPIRES, "cat >/dev/null")
    assert stubs.console == ""
    assert "poweroff" not in stubs.calls.read_text()
    assert "enable -q --now cml-runner-deadline.timer" in stubs.calls.read_text()


def test_a_machine_that_comes_too_late_is_ended(tmp_path: Path) -> None:
    past = datetime(2001, 1, 1, tzinfo=timezone.utc)
    stubs = Stubs(tmp_path, past, "")
    assert stubs.console.startswith(f"{FAILED}: the deadline\n")
    calls = stubs.calls.read_text()
    assert "python3" not in calls
    assert "systemctl --force poweroff" in calls
