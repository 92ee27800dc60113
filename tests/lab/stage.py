"""A region of one cloud with machines that really boot, in the words of scenes for all clouds.

    def test_something(stage: Stage) -> None:     # once on each cloud
        stage.submit("train", "echo hello")
        stage.launch("--cloud-spot")
        stage.interrupt()

What a cloud does to its machines stands here; what a scene is about doesn't.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner.wait import until
from tests.lab.azure.region import AzureRegion
from tests.lab.gcp.region import GoogleRegion
from tests.lab.prepare import ROOT
from tests.lab.region import Region

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.lab.machines import Machine
    from tests.worlds import Seen, World

LABEL = "x"
REFUSALS = ("Unauthorized", "Auth", "Required")  # in the words of all clouds
OUTSIDE = "Microsoft.Compute/skus/read"  # a right that nobody has on a resource group
PATIENCE = 60  # seconds
NOTICE = {"aws": 30, "azure": 30, "gcp": 120}  # seconds, of which machines take but few
WRITE = """
import sys
from cml_runner import clouds
from cml_runner.model import Identifier, Task
cloud, region, part, identifier, name, content = sys.argv[1:]
bucket = clouds.load(cloud, region).plan(Task(id=Identifier.parse(identifier))).bucket
getattr(bucket, part).write(name, content.encode())
"""
ASK = "curl -s -m 3"


@dataclass(frozen=True)
class Place:
    """Where a cloud's scenes are played."""

    kind: type[Region]
    region: str
    metadata: str  # what a machine asks for its own name


PLACES: Mapping[str, Place] = {
    "aws": Place(
        Region,
        "us-west-2",
        "-X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 9' http://169.254.169.254/latest/api/token",
    ),
    "azure": Place(
        AzureRegion,
        "westus2",
        "-H Metadata:true"
        " 'http://169.254.169.254/metadata/instance/compute?api-version=2021-12-13'",
    ),
    "gcp": Place(
        GoogleRegion,
        "us-west1",
        "-H 'Metadata-Flavor: Google' http://169.254.169.254/computeMetadata/v1/instance/id",
    ),
}


@dataclass(frozen=True)
class Stage:
    """A region in which launchers may do no more than our own policy says."""

    cloud: str
    region: Any
    name: str  # of the region

    @property
    def there(self) -> Any:
        """The fake cloud."""
        return getattr(self.region, self.cloud)

    @property
    def world(self) -> World:
        """The forge."""
        found: World = self.region.world
        return found

    @property
    def place(self) -> tuple[str, ...]:
        return ("--cloud", self.cloud, "--cloud-region", self.name)

    # What people do

    def cli(
        self, *arguments: str, code: int = 0, checkout: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self.region.cli(*arguments, checkout=checkout)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}\n{self.region.said()}"
        return done

    def try_launch(
        self, *more: str, code: int, checkout: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        limit = ("--wait-timeout", "80s")
        words = ("launch", *self.place, "--labels", LABEL, *limit, *more)
        return self.cli(*words, code=code, checkout=checkout)

    def launch(self, *more: str, checkout: Path = ROOT) -> dict[str, Any]:
        done = self.try_launch(*more, code=0, checkout=checkout)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def write(self, part: str, identifier: str, name: str, content: str) -> None:
        """Write an object as a launcher can: of a task (`store`), or a program (`programs`)."""
        command = [sys.executable, "-c", WRITE, self.cloud, self.name, part, identifier, name]
        done = self.region.internet.run([*command, content], self.region.environment())
        assert done.returncode == 0, done.stderr

    def submit(self, name: str, script: str) -> None:
        self.world.submit(name, script, LABEL)

    # What can be seen

    def job(self, name: str) -> Seen:
        return self.world.job(name)

    def only(self) -> Machine:
        machine: Machine
        (machine,) = self.region.alive()
        return machine

    def wait(self, condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        try:
            until(condition, what, timeout, 0.1)
        except Exception as error:
            calls = [str(one)[:200] for one in self.there.app.calls[-10:]]
            seen = "\n".join((*self.there.left(), *calls, self.region.said()))
            raise AssertionError(f"{error}\n{seen}") from error

    def wait_for_job(self, name: str, timeout: float = PATIENCE) -> None:
        self.wait(lambda: self.job(name).state == "succeeded", f"the good end of {name}", timeout)

    def wait_for_log(self, name: str, text: str) -> None:
        self.wait(lambda: text in self.job(name).log, f"{text} in the log of {name}")

    def wait_for_another(self, first: str) -> None:
        """Wait until a machine is gone; perhaps there is one in its place already."""
        alive = self.region.alive
        self.wait(lambda: first not in [one.instance.id for one in alive()], f"the end of {first}")

    def costly(self) -> list[str]:
        return [one for one in self.there.left() if not one.startswith("object")]

    def nothing_is_left(self) -> None:
        self.wait(lambda: self.there.left() == [], "all to go")
        assert self.world.runners() == {}
        for machine in self.region.machines.values():
            machine.end()

    def ask_metadata(self, machine: Machine, user: str = "") -> subprocess.CompletedProcess[str]:
        """Ask the metadata service for what only this machine knows, as root or somebody else."""
        question = f"{ASK} {PLACES[self.cloud].metadata}"
        return machine.run(f"runuser -u {user} -- {question}" if user else question)

    # What the cloud does

    def throttle_ends(self, times: int) -> Any:
        """Have the cloud refuse that many times to end a machine."""
        match self.cloud:
            case "aws":
                action = "autoscaling:TerminateInstanceInAutoScalingGroup"
                return self.there.fail(action, "Throttling", "Rate exceeded", times=times)
            case "azure":
                action = "Microsoft.Compute/virtualMachines/delete"
                return self.there.fail(action, "TooManyRequests", times=times, status=429)
        action = "compute.regionInstanceGroupManagers.recreateInstances"
        return self.there.fail(action, 429, "rateLimitExceeded", times=times)

    def interrupt(self) -> str:
        """Announce that the machine will be taken away, and take it; return its name."""
        name = self.only().instance.id
        match self.cloud:
            case "aws":
                self.there.instances.interrupt(name, after=NOTICE[self.cloud])
            case "azure":
                self.there.fleet.evict(name, after=NOTICE[self.cloud])
            case "gcp":
                self.there.compute.preempt(name, after=NOTICE[self.cloud])
        return name

    def cut(self) -> str:
        """Take the machine away without a word; return its name."""
        name = self.only().instance.id
        match self.cloud:
            case "aws":
                self.there.instances.terminate(self.name, name, "Server.InternalError")
            case "azure":
                self.there.fleet.evict(name, after=0)
            case "gcp":
                self.there.compute.crash(name)
        return name


@contextmanager
def opened(cloud: str, prepared: Path, directory: Path, suite: str, forge: str) -> Iterator[Stage]:
    """Set a region up; say in the end which rights were missing."""
    place = PLACES[cloud]
    with place.kind(prepared, directory, suite, forge) as region:
        stage = Stage(cloud, region, place.region)
        stage.cli("setup", cloud, "--cloud-region", place.region)
        role = json.loads(stage.cli("permissions", cloud, "--cloud-region", place.region).stdout)
        region.launcher = stage.there.add_user(role)
        yield stage
        refused = [
            one for one in stage.there.app.calls if any(word in one.error for word in REFUSALS)
        ]
        # Who nobody is only wants to know what time it is.
        assert not [one for one in refused if one.action != OUTSIDE and one.who != "nobody"], (
            refused
        )
