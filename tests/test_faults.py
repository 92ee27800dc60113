"""What goes wrong, with the real program: an error that helps, an exit code, and nothing left."""

from __future__ import annotations

import base64
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.conftest import processes_of
from tests.test_life import gone, kill, launch, nothing_is_left, on, over
from tests.worlds import Local, OnGitHub, wait

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Cli
    from tests.lab.github import GitHub
    from tests.worlds import World


@pytest.fixture
def local(tmp_path: Path) -> Local:
    return Local(tmp_path)


@pytest.fixture
def remote() -> Iterator[OnGitHub]:
    world = OnGitHub()
    yield world
    world.leave_alone()


@pytest.fixture
def github(remote: OnGitHub) -> GitHub:
    return remote.github


def refused(cli: Cli, world: Local | OnGitHub, code: int, *more: str, token: str = "") -> str:
    """Launch in vain; return what people read."""
    environment = {**world.environment, **({"REPO_TOKEN": token} if token else {})}
    arguments = ("launch", "--repo", world.repo, "--cloud", "local", *more)
    done = cli.run(*arguments, environment=environment, code=code)
    assert "Traceback" not in done.err
    assert done.out == ""
    return done.err


# Wrong options


def test_all_mistakes_are_told_at_once(cli: Cli, local: Local) -> None:
    more = "--single --reuse --idle-timeout 5parsecs --count 0 --cloud-hdd-size big --no-sudo"
    err = refused(cli, local, 2, *more.split(), "--cloud-metadata", "x", "--max-lifetime", "soon")
    for mistake in (
        "--single conflicts with --reuse",
        "--idle-timeout: '5parsecs' is no duration",
        "--count: '0' is no whole number",
        "--cloud-hdd-size: 'big' is no whole number",
        "--no-sudo needs",
        "--cloud-metadata x: write KEY=VALUE",
        "--max-lifetime: 'soon' is no duration",
    ):
        assert mistake in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--cloud-region", "mars"), "region 'mars'"),
        (("--cloud-type", "xxl"), "type 'xxl'"),
        (("--cloud-gpu", "t4", "--cloud-image", "windows"), "gpu t4"),
        (("--cloud-aws-subnet", "subnet-1"), "--cloud-aws-subnet makes no sense"),
        (("--cloud", "moon"), "--cloud moon: choose one of"),
        (("--cloud-startup-script", "%%%"), "neither Base64 nor @FILE"),
        (("--cloud-startup-script", "@/none"), "/none: No such file"),
        (("--cloud-region", ","), "--cloud-region: at least one is needed"),
        (("--cloud-type", ""), "--cloud-type: at least one is needed"),
        (("--driver", "sourcehut"), "--driver sourcehut: choose one of"),
        (("--github-app-id", "1"), "go together"),
    ],
)
def test_wrong_options(cli: Cli, local: Local, more: tuple[str, ...], message: str) -> None:
    assert message in refused(cli, local, 2, *more)


def test_no_repository(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli.run("launch", code=2)
    assert "no repository: use --repo" in done.err


# The forge says no


def test_a_missing_token_names_the_variables(cli: Cli, remote: OnGitHub) -> None:
    done = cli.run("launch", "--driver", "github", "--repo", remote.repo, code=3)
    assert "REPO_TOKEN" in done.err


def test_a_wrong_token(cli: Cli, remote: OnGitHub) -> None:
    assert "is wrong or expired" in refused(cli, remote, 3, token="ghp_wrongwrongwrong")


def test_a_token_without_permission(cli: Cli, remote: OnGitHub, github: GitHub) -> None:
    token = github.add_fine_grained_token("acme/model", actions="write", metadata="read")
    assert "Administration" in refused(cli, remote, 3, token=token)


def test_the_token_of_a_workflow(cli: Cli, remote: OnGitHub, github: GitHub) -> None:
    err = refused(cli, remote, 3, token=github.add_workflow_token("acme/model"))
    assert "GITHUB_TOKEN" in err


def test_a_repository_that_does_not_exist(cli: Cli, remote: OnGitHub, github: GitHub) -> None:
    remote.repo = f"{github.url}/acme/nothing"
    assert "acme/nothing" in refused(cli, remote, 4)


def test_the_forge_is_down(cli: Cli, remote: OnGitHub, home: Path) -> None:
    remote.repo = "http://127.0.0.1:9/acme/model"
    start = time.monotonic()
    assert "127.0.0.1" in refused(cli, remote, 1)
    assert time.monotonic() - start < 30
    assert not list(home.rglob("lease.json"))


def test_a_name_that_is_taken(cli: Cli, local: Local) -> None:
    identifier = launch(cli, local, "--name", "one")
    assert "use --reuse" in refused(cli, local, 5, "--name", "one")
    reused = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "one", "--reuse")
    done = cli.run(*reused)
    assert done.json["reused"] is True
    assert "nothing was launched" in done.err
    assert [one["id"] for one in cli.run("list", "--output", "json").json] == [identifier]
    cli.run("destroy", "one")


# The machine has trouble


def test_a_wrong_checksum(cli: Cli, remote: OnGitHub, github: GitHub, home: Path) -> None:
    github.checksum = "0" * 64
    err = refused(cli, remote, 8)
    assert "SHA-256" in err
    nothing_is_left(remote, home)


def test_an_agent_that_dies(cli: Cli, remote: OnGitHub, github: GitHub, home: Path) -> None:
    github.fault("POST", "/_runner/.*", 999, status=500)
    refused(cli, remote, 8)
    nothing_is_left(remote, home)


def test_an_agent_that_never_comes_online(
    cli: Cli, remote: OnGitHub, github: GitHub, home: Path
) -> None:
    github.fault("POST", ".*session.*", 999, delay=20)
    err = refused(cli, remote, 11, "--wait-timeout", "4s")
    assert "no runner was online within 4 s" in err
    assert "everything that was launched is deleted" in err
    wait(lambda: not any(remote.runners().values()), "it to be gone")
    assert not list(home.rglob("lease.json"))


def test_an_agent_that_is_refused_for_its_age(
    cli: Cli, remote: OnGitHub, github: GitHub, home: Path
) -> None:
    """Only an announced end can be avoided; here the version is refused all of a sudden."""
    github.deprecated.add(github.version)
    err = refused(cli, remote, 8)
    assert "deprecated" in err
    nothing_is_left(remote, home)


def test_a_startup_script_that_fails(cli: Cli, local: Local, home: Path, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("echo no such driver; exit 3")
    err = refused(cli, local, 1, "--cloud-startup-script", f"@{tmp_path}/script")
    assert "the startup script failed with exit code 3" in err
    assert "no such driver" in err
    nothing_is_left(local, home)


# The forge has trouble


def test_the_forge_is_down_when_the_runner_wants_to_leave(
    cli: Cli, remote: OnGitHub, github: GitHub, home: Path
) -> None:
    launch(cli, remote, "--name", "late", "--idle-timeout", "2s")
    github.fault("GET", ".*/actions/runners.*", 999, status=503)
    github.fault("DELETE", ".*", 999, status=503)
    wait(lambda: gone(cli, home), "the runner to leave", 150)
    log = "".join(path.read_text() for path in home.rglob("log-*"))
    assert "may still be registered" in log
    wait(lambda: remote.runners() == {"late": False}, "the forge to notice")


def test_the_forge_is_down_during_a_job(
    cli: Cli, remote: OnGitHub, github: GitHub, home: Path
) -> None:
    launch(cli, remote, "--name", "steady", "--idle-timeout", "2s")
    remote.submit("train", "echo first half; sleep 3; echo second half")
    wait(lambda: remote.job("train").state == "running", "the job")
    github.fault("GET", "/repos/.*", 20, status=502)
    github.fault("POST", "/repos/.*", 20, drop=True)
    wait(lambda: remote.job("train").state == "succeeded", "its good end")
    wait(lambda: gone(cli, home), "the runner to leave", 150)


def test_what_is_destroyed_leaves_the_forge_too(
    cli: Cli, remote: OnGitHub, github: GitHub, home: Path
) -> None:
    """Its machine can't unregister itself any more; runners of others have names like its own."""
    launch(cli, remote, "--name", "gpu", "--count", "2")
    for name in ("gpu-large", "gpu-2"):
        github.register(github.place("repos", "acme/model"), name, ("cml",))
    for machine in (home / "local").glob("*/*/machines/*/"):
        suspend(machine)
    repository = ("--repo", remote.repo)
    wait(lambda: not any(remote.runners().values()), "the forge to notice")
    cli.run("destroy", "gpu", *repository, environment=remote.environment)
    assert set(remote.runners()) == {"gpu-large", "gpu-2"}


def suspend(machine: Path) -> None:
    for process in psutil.process_iter():
        if on(process, machine):
            process.suspend()


# Somebody dies


def half_launched(cli: Cli, local: Local, home: Path) -> None:
    launcher = cli.start("launch", "--repo", local.repo, "--cloud", "local", "--name", "half")
    wait(lambda: list(home.rglob("lease.json")), "the first resource")
    launcher.kill()
    launcher.wait()


def test_a_launcher_killed_between_two_resources(cli: Cli, local: Local, home: Path) -> None:
    half_launched(cli, local, home)
    (half,) = cli.run("gc", "--dry-run", "--output", "json").json["found"]
    assert half.startswith("cml-half-")
    assert cli.run("gc", "--output", "json").json["removed"] == [half]
    assert over(cli)
    wait(lambda: not any(local.runners().values()), "it to be gone")


def test_a_launch_that_died_does_not_hinder_the_next(cli: Cli, local: Local, home: Path) -> None:
    half_launched(cli, local, home)
    launch(cli, local, "--name", "half")
    assert local.runners() == {"half": True}
    cli.run("destroy", "half")
    nothing_is_left(local, home)


def test_gc_leaves_alone_what_is_being_launched(cli: Cli, local: Local, home: Path) -> None:
    launcher = cli.start("launch", "--repo", local.repo, "--cloud", "local", "--name", "new")
    wait(lambda: list(home.rglob("lease.json")), "the first resource")
    assert cli.run("gc", "--output", "json").json["removed"] == []
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err
    assert cli.run("gc", "--output", "json").json["removed"] == []
    cli.run("destroy", "new")


def test_ctrl_c_while_waiting(cli: Cli, remote: OnGitHub, github: GitHub, home: Path) -> None:
    github.fault("POST", ".*session.*", 999, delay=3)
    launcher = cli.start(
        *("launch", "--repo", remote.repo, "--cloud", "local"), environment=remote.environment
    )
    wait(remote.runners, "the registration")
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, out) == (130, "")
    assert "deleting what was launched" in err
    assert not list(home.rglob("lease.json"))


def test_the_keeper_is_killed(cli: Cli, local: Local, home: Path) -> None:
    launch(cli, local, "--name", "orphan", "--idle-timeout", "8s")
    (keeper,) = processes_of(home, "cml_runner.clouds.local")
    keeper.kill()
    keeper.wait(10)
    local.submit("train", "echo still here")
    wait(lambda: local.job("train").state == "succeeded", "the job")
    assert [one["name"] for one in cli.run("list", "--output", "json").json] == ["orphan"]
    for machine in (home / "local").glob("*/*/machines/*/"):
        kill(machine)
    wait(lambda: local.runners() == {"orphan": True}, "the new keeper's new machine")
    wait(lambda: over(cli), "the end")
    nothing_is_left(local, home)


def test_a_supervisor_that_hangs_ends_at_the_deadline(cli: Cli, local: Local, home: Path) -> None:
    launch(cli, local, "--name", "hung", "--max-lifetime", "6s")
    (supervisor,) = processes_of(home, "cml_runner.supervise")
    supervisor.suspend()
    wait(lambda: gone(cli, home), "the deadline")
    wait(lambda: not any(local.runners().values()), "its agent to be gone")


# Several at once


def test_two_launches_of_one_name_at_once(cli: Cli, local: Local) -> None:
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "twin")
    both = [cli.start(*arguments) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 5], errors
    assert len(cli.run("list", "--output", "json").json) == 1
    cli.run("destroy", "twin")


def test_two_launches_that_reuse_each_other(cli: Cli, local: Local) -> None:
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "twin", "--reuse")
    both = [cli.start(*arguments) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(cli.run("list", "--output", "json").json) == 1
    cli.run("destroy", "twin")


def test_a_second_launch_leaves_the_first_alone(cli: Cli, local: Local, tmp_path: Path) -> None:
    """Also where the first has registered its machine, which isn't up yet."""
    (tmp_path / "slow").write_text("sleep 2")
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "one", "--single")
    first = cli.start(*arguments, "--cloud-startup-script", f"@{tmp_path}/slow")
    wait(local.runners, "the registration")
    cli.run(*arguments, code=5)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert local.runners() == {"one": True}
    cli.run("destroy", "one")


def test_one_name_in_two_regions(cli: Cli, local: Local, tmp_path: Path) -> None:
    """The claim doesn't reach that far, but the forge has an eye on names."""
    (tmp_path / "slow").write_text("sleep 3")
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "one")
    slow = ("--cloud-region", "us-east", "--cloud-startup-script", f"@{tmp_path}/slow")
    first = cli.start(*arguments, *slow)
    second = cli.start(*arguments, "--cloud-region", "us-west")
    assert second.communicate(timeout=60)
    out, err = first.communicate(timeout=60)
    assert (second.returncode, first.returncode, out) == (0, 5, ""), err
    assert local.runners() == {"one": True}
    cli.run("destroy", "one")


def test_a_guest_does_not_wait_for_a_launch_that_was_given_up(cli: Cli, local: Local) -> None:
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "one", "--reuse")
    script = base64.b64encode(b"sleep 60").decode()
    first = cli.start(*arguments, "--cloud-startup-script", script)
    wait(lambda: cli.run("list").out, "the claim")
    guest = cli.start(*arguments)
    assert guest.stderr
    while "waiting for it" not in guest.stderr.readline():
        pass
    first.terminate()
    first.communicate(timeout=60)
    _, err = guest.communicate(timeout=30)
    assert guest.returncode == 11, err
    assert "was given up" in err


def test_two_runners_do_not_live_in_one_directory(cli: Cli, local: Local) -> None:
    arguments = ("launch", "--repo", local.repo, "--idle-timeout", "1h", "--workdir", "here")
    first = cli.start(*arguments)
    wait(lambda: any(local.runners().values()), "the first")
    assert "another runner lives in" in cli.run(*arguments, code=5).err
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert not Path("here").exists()


def test_a_directory_of_the_users_is_never_deleted(cli: Cli, local: Local, tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    (own / "thesis").touch()
    arguments = ("launch", "--repo", local.repo, "--workdir", str(own), "--idle-timeout", "1s")
    for _ in range(2):
        cli.run(*arguments)
        assert (own / "thesis").exists()


def test_one_name_of_several_runners(cli: Cli, local: Local, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    other = Local(tmp_path / "second")
    for one in (local, other):
        launch(cli, one, "--name", "gpu")
    err = cli.run("destroy", "gpu", code=2).err
    assert "several runners are called gpu" in err
    for row in cli.run("list", "--output", "json").json:
        assert row["id"] in err
        cli.run("destroy", row["id"])


# Odd things


def test_a_status_of_another_version_hinders_nobody(cli: Cli, local: Local, home: Path) -> None:
    launch(cli, local, "--name", "odd")
    (status,) = home.rglob("status-000.json")
    for process in processes_of(home, "cml_runner.supervise"):
        process.suspend()
    status.write_text('{"state": "levitating"}')
    assert "another version" in cli.run("list").err
    cli.run("destroy", "odd")
    assert over(cli)


def test_an_agent_killed_in_the_middle_of_a_job(cli: Cli, world: World, home: Path) -> None:
    """By the kernel say, for want of memory: another machine comes, and the job runs again."""
    world.submit("train", "echo first half; sleep 3; echo second half")
    launch(cli, world, "--name", "killed", "--idle-timeout", "2s")
    wait(lambda: "first half" in world.job("train").log, "the middle of the job")
    (status,) = home.rglob("status-000.json")
    wait(lambda: '"attempt":1' in status.read_text(), "the status")
    (supervisor,) = processes_of(home, "cml_runner.supervise")
    (agent,) = supervisor.children()
    agent.kill()
    wait(lambda: world.job("train").state == "succeeded", "its good end", 60)
    assert world.job("train").attempt == 2
    wait(lambda: gone(cli, home), "the end")


def test_outputs_that_can_not_be_written(cli: Cli, local: Local) -> None:
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "one")
    done = cli.run(*arguments, environment={"GITHUB_OUTPUT": "/no/such/file"})
    assert done.json["name"] == "one"
    assert "can't write /no/such/file" in done.err
    cli.run("destroy", "one")


def test_fifty_machines_at_once(cli: Cli, local: Local, home: Path) -> None:
    launch(cli, local, "--name", "many", "--count", "50", "--idle-timeout", "1h")
    assert local.runners() == {f"many-{number}": True for number in range(50)}
    for number in range(60):
        local.submit(f"job-{number}", "true")
    wait(lambda: all(one.state == "succeeded" for one in local.forge.jobs()), "all jobs", 60)
    cli.run("destroy", "many")
    nothing_is_left(local, home)
