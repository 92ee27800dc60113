"""What goes wrong with GitLab and Bitbucket, with the real program."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner.model import Identifier
from tests.lab.gitlab import Runner as Registered
from tests.test_life import gone, launch, nothing_is_left, over
from tests.worlds import OnBitbucket, OnGitLab, wait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Cli

# All that we ask for, but nothing that the runner's program does.
API = {"gitlab": "/api/(graphql|v4/(?!jobs/).*)", "bitbucket": "/2.0/.*"}


class Troubled:
    """A forge, and what may happen to it."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.world = OnGitLab() if name == "gitlab" else OnBitbucket(root)
        one = self.world
        self.side = one.gitlab if isinstance(one, OnGitLab) else one.bitbucket

    def break_down(self) -> None:
        for method in ("GET", "POST", "PUT", "DELETE"):
            self.side.fault(method, API[self.name], 9999, status=503)

    def revoke(self) -> None:
        """Let the credential expire."""
        if isinstance(self.world, OnGitLab):
            self.world.gitlab.tokens.clear()
        else:
            self.world.bitbucket.credentials.clear()

    def remove_by_hand(self) -> None:
        with self.side.changed:
            self.side.runners.clear()

    def fill(self) -> None:
        """Use the quota of runners up."""
        status, path = 400, ".*/(user/runners|pipelines-config/runners)"
        said = "Maximum number of ci registered project runners exceeded"
        body = {"message": said, "error": {"message": said}}
        self.side.fault("POST", path, 99, status=status, body=body)


@pytest.fixture(params=API)
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Troubled]:
    found = Troubled(request.param, tmp_path)
    yield found
    found.world.leave_alone()


def test_down_at_launch(cli: Cli, there: Troubled, home: Path) -> None:
    there.break_down()
    arguments = ("launch", "--repo", there.world.repo, "--cloud", "local")
    done = cli.run(*arguments, environment=there.world.environment, code=1)
    assert "503" in done.err
    assert not list(home.rglob("lease.json"))


def test_down_when_the_runner_wants_to_leave(cli: Cli, there: Troubled, home: Path) -> None:
    launch(cli, there.world, "--name", "late", "--idle-timeout", "2s")
    there.break_down()
    wait(lambda: gone(cli, home), "the runner to leave", 150)
    log = "".join(path.read_text() for path in home.rglob("log-*"))
    assert "late may still be registered" in log
    wait(lambda: there.world.runners() == {"late": False}, "the forge to notice")


def test_a_credential_that_expires_during_a_job(cli: Cli, there: Troubled, home: Path) -> None:
    launch(cli, there.world, "--name", "gone", "--idle-timeout", "2s")
    there.world.submit("train", "echo first half; sleep 2; echo second half")
    wait(lambda: there.world.job("train").state == "running", "the job")
    there.revoke()
    wait(lambda: there.world.job("train").state == "succeeded", "its good end")
    wait(lambda: gone(cli, home), "the runner to leave", 90)
    log = "".join(path.read_text() for path in home.rglob("log-*"))
    assert "wrong or expired" in log


def test_removed_by_hand_while_idle(cli: Cli, there: Troubled, home: Path) -> None:
    identifier = launch(cli, there.world, "--name", "gone", "--idle-timeout", "never")
    there.remove_by_hand()
    wait(lambda: over(cli), "the runner to give up", 60)
    assert "the agent was cut off" in cli.run("logs", identifier).out
    nothing_is_left(there.world, home)


def test_removed_by_hand_during_a_job(cli: Cli, there: Troubled, home: Path) -> None:
    launch(cli, there.world, "--name", "gone", "--idle-timeout", "2s")
    there.world.submit("train", "echo first half; sleep 3; echo second half")
    wait(lambda: "first half" in there.world.job("train").log, "the job")
    there.remove_by_hand()
    wait(lambda: over(cli), "the runner to leave", 60)
    nothing_is_left(there.world, home)


def test_a_name_that_is_taken(cli: Cli, there: Troubled) -> None:
    here = ("launch", "--repo", there.world.repo, "--name", "one")
    first = cli.start(*here, environment=there.world.environment)
    wait(lambda: there.world.runners() == {"one": True}, "the first")
    done = cli.run(*here, "--cloud", "local", environment=there.world.environment, code=5)
    assert "a runner named one is online" in done.err
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert there.world.runners() == {}


def test_an_idle_runner_is_reused(cli: Cli, there: Troubled, home: Path) -> None:
    launch(cli, there.world, "--name", "one", "--idle-timeout", "6s")
    again = ("launch", "--repo", there.world.repo, "--cloud", "local", "--reuse-idle")
    environment = there.world.environment
    assert "nothing is launched" in cli.run(*again, environment=environment).err
    there.world.submit("train", "sleep 3")
    wait(lambda: there.world.job("train").state == "running", "the job")
    other = cli.run(*again, "--name", "two", "--idle-timeout", "1s", environment=environment)
    assert other.json["name"] == "two"
    wait(lambda: gone(cli, home), "both to leave")


def test_no_room_for_another_runner(cli: Cli, there: Troubled, home: Path) -> None:
    there.fill()
    arguments = ("launch", "--repo", there.world.repo, "--cloud", "local")
    done = cli.run(*arguments, environment=there.world.environment, code=1)
    assert "exceeded" in done.err
    assert "cml-runner gc" in done.err
    assert "deleting what was launched" in done.err
    nothing_is_left(there.world, home)


def test_stale_registrations_are_swept(cli: Cli) -> None:
    world = OnGitLab()
    try:
        launch(cli, world, "--name", "living")
        old = datetime.now(timezone.utc) - timedelta(days=2)
        note = next(iter(world.gitlab.runners.values())).note
        ours = str(Identifier.new("model"))
        registered = (
            ("theirs", "", old),
            ("ours", note, old),
            ("ours-but-new", note, None),
            (ours, "", old),
            (f"{ours}-12", "", old),
            ("cml-almost-like-ours", "", old),
        )
        for number, (name, mark, seen) in enumerate(registered):
            place = world.gitlab.places["acme/model"]
            made = Registered(number, f"glrt-{number}", place, "project_type", name, note=mark)
            made.contacted = seen
            world.gitlab.runners[number] = made
        gc = ("gc", "--repo", world.repo, "--output", "json")
        found = {"ours", ours, f"{ours}-12"}
        dry = cli.run(*gc, "--dry-run", environment=world.environment).json
        assert (set(dry["found"]), dry["removed"]) == (found, [])
        assert set(cli.run(*gc, environment=world.environment).json["removed"]) == found
        left = {"living", "theirs", "ours-but-new", "cml-almost-like-ours"}
        assert set(world.runners()) == left
        cli.run("destroy", "living")
    finally:
        world.leave_alone()
