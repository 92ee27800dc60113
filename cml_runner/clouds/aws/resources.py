"""The resources of a task, but for its group: the claim, the settings, template and key."""

from __future__ import annotations

import base64
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import bootstrap
from cml_runner import leases as base
from cml_runner.boot.aws import TAG
from cml_runner.boot.objects import PROGRAMS
from cml_runner.clouds.aws.account import ROLE, Shared
from cml_runner.errors import AlreadyExists, NotFound, RunnerError
from cml_runner.keys import public_key
from cml_runner.leases import LEASES, TASKS, Claim
from cml_runner.store import Store

if TYPE_CHECKING:
    from cml_runner.clouds import Resource
    from cml_runner.clouds.aws.session import Session
    from cml_runner.clouds.aws.site import Site
    from cml_runner.model import Task

log = logging.getLogger(__name__)

LONGEST_TAG = 256  # characters of a value


def claims(session: Session) -> Store:
    """Open what says which tasks there are."""
    return _open(session, LEASES)


@dataclass(frozen=True, eq=False)
class Bucket(base.Bucket):
    """The task's part of the account's bucket. Who has put its lease object there has the task."""

    session: Session
    site: Site | None  # None: it won't be created

    @cached_property
    def store(self) -> Store:
        """Where the task's objects are."""
        return _open(self.session, f"{TASKS}/{self.task.id}")

    @cached_property
    def leases(self) -> Store:
        """Where its lease is."""
        return claims(self.session)

    @cached_property
    def programs(self) -> Store:
        """Where the programs of machines are."""
        return _open(self.session, PROGRAMS)

    def create(self) -> bool:
        """Put the lease there, unless there is one; before that, see if all else can be had."""
        assert self.site
        self.site.look()
        try:
            return self._claim()
        except NotFound:
            Shared(self.session).setup(self.site.network)
            return self._claim()

    def _claim(self) -> bool:
        """Put it with a call which makes sure whose bucket this is: its name can be guessed."""
        content = Claim.new(self.task)
        try:
            self.session.call(
                "s3",
                "put_object",
                Bucket=Shared(self.session).bucket,
                ExpectedBucketOwner=self.session.account.id,
                Key=f"{LEASES}/{base.key(self.task.id)}",
                Body=content.encoded(),
                IfNoneMatch="*",
            )
        except AlreadyExists:
            return False
        except RunnerError as error:
            if "ConditionalRequestConflict" in str(error):  # two at the very same time
                return False
            raise
        self.ours.append(content)
        return True


@dataclass(frozen=True, eq=False)
class KeyPair:
    """The public half of the user's key."""

    bucket: Bucket
    label: str = "key pair"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """It bears the task's name."""
        return (self.bucket,)

    def create(self) -> bool:
        """Import it."""
        task = self.bucket.task
        return self.bucket.session.make(
            "ec2",
            "import_key_pair",
            KeyName=str(task.id),
            PublicKeyMaterial=public_key(task.machine.ssh_key),
            TagSpecifications=tags(task, "key-pair"),
        )

    def delete(self) -> None:
        """Delete it."""
        _delete(self.bucket, "key_pair", "KeyName", "key-name")


@dataclass(frozen=True, eq=False)
class LaunchTemplate:
    """What every machine of the task is like."""

    bucket: Bucket
    site: Site | None
    key: KeyPair | None
    label: str = "launch template"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """Only the lease: a key pair is looked up when a machine starts."""
        return (self.bucket,)

    def create(self) -> bool:
        """Create it."""
        task = self.bucket.task
        return self.bucket.session.make(
            "ec2",
            "create_launch_template",
            LaunchTemplateName=str(task.id),
            LaunchTemplateData=self._data(),
            TagSpecifications=tags(task, "launch-template"),
        )

    def delete(self) -> None:
        """Delete it; what it has launched lives on."""
        _delete(self.bucket, "launch_template", "LaunchTemplateName", "launch-template-name")

    def _data(self) -> dict[str, Any]:
        assert self.site
        task, image = self.bucket.task, self.site.image
        size = max(task.machine.disk, image.size)
        if task.machine.disk and size > task.machine.disk:
            log.warning("the image needs a disk of %d GB", size)
        volume = {"VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
        disk = {
            "DeviceName": image.device,
            "Ebs": {**volume, **({"VolumeSize": size} if size else {})},
        }
        script = start_script(task, self.bucket.store.url, self.bucket.session.region)
        return {
            "ImageId": image.id,
            "UserData": base64.b64encode(script.encode()).decode(),
            "IamInstanceProfile": profile(task.machine.permissions),
            "SecurityGroupIds": self.site.security_groups,
            "BlockDeviceMappings": [disk],
            # One hop: containers, which jobs start, can't reach the metadata service.
            "MetadataOptions": {
                "HttpEndpoint": "enabled",
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": 1,
                "InstanceMetadataTags": "enabled",
            },
            "InstanceInitiatedShutdownBehavior": "terminate",
            "TagSpecifications": tags(task, "instance", "volume", "network-interface"),
            **({"KeyName": str(task.id)} if self.key else {}),
        }


def start_script(task: Task, url: str, region: str) -> str:
    """Write the user data: where the task's objects are, and which task this is."""
    full = f"{url}#aws/{region}/{task.id}"
    return bootstrap.machine(full, task.program, task.expires, task.count)


def tags(task: Task, *kinds: str) -> list[dict[str, Any]]:
    """Tag resources of these kinds as the task's own."""
    values = {**task.tags, "Name": task.tags.get("name", str(task.id)), TAG: str(task.id)}
    listed = [{"Key": key, "Value": value[:LONGEST_TAG]} for key, value in values.items()]
    return [{"ResourceType": kind, "Tags": listed} for kind in kinds]


def profile(permissions: str) -> dict[str, str]:
    """Name the machine's identity, as EC2 wants it."""
    return {"Arn" if permissions.startswith("arn:") else "Name": permissions or ROLE}


def _delete(bucket: Bucket, kind: str, key: str, name: str) -> None:
    """Delete one of EC2's things, if it is there.

    We may only delete what has our tag; of what isn't there EC2 would say that we may not.
    """
    identifier, call = str(bucket.task.id), bucket.session.call
    filters = [{"Name": name, "Values": [identifier]}]
    found = call("ec2", f"describe_{kind}s", Filters=filters)
    if any(isinstance(value, list) and value for value in found.values()):
        with suppress(NotFound):
            call("ec2", f"delete_{kind}", **{key: identifier})


def _open(session: Session, prefix: str) -> Store:
    name = Shared(session).bucket
    return Store(f"s3://{name}/{prefix}?region={session.region}", session.credentials)
