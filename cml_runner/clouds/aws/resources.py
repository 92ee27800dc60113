"""The resources of a task, but for its group: the claim, the settings, template and key."""

from __future__ import annotations

import base64
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from cml_runner import bootstrap, store
from cml_runner.clouds.aws.account import LEASES, ROLE, TAG, TASKS, Shared
from cml_runner.errors import AlreadyExists, NotFound, RunnerError
from cml_runner.keys import public_key
from cml_runner.model import Lease

if TYPE_CHECKING:
    from cml_runner.clouds import Resource
    from cml_runner.clouds.aws.session import Session
    from cml_runner.clouds.aws.site import Site
    from cml_runner.model import Task

log = logging.getLogger(__name__)

LAUNCH = timedelta(hours=1)  # the longest that one can take
LONGEST_TAG = 256  # characters of a value


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the lease object holds."""

    created: datetime
    expires: datetime | None
    launched: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    keeps: bool = False  # it stays when the machines are gone


def leases(session: Session) -> store.Store:
    """Open what says which tasks there are."""
    return _open(session, LEASES)


def lease(task: Task, claim: Claim) -> Lease:
    """Say how long a task may be there; one whose launcher died before the end isn't long."""
    expires = claim.expires
    if not claim.launched:
        given_up = claim.created + LAUNCH
        expires = min(expires, given_up) if expires else given_up
    return Lease(
        id=task.id,
        created=claim.created,
        expires=expires,
        tags=claim.tags,
        keeps=claim.keeps and claim.launched,
    )


@dataclass(frozen=True, eq=False)
class Bucket:
    """The task's part of the account's bucket. Who has put its lease object there has the task."""

    session: Session
    task: Task
    site: Site | None  # None: it won't be created
    label: str = "lease"
    needs: tuple[Resource, ...] = ()
    ours: list[Claim] = field(default_factory=list, init=False)  # what we have put there

    @cached_property
    def store(self) -> store.Store:
        """Where the task's objects are."""
        return _open(self.session, f"{TASKS}/{self.task.id}")

    def create(self) -> bool:
        """Put the lease there, unless there is one; before that, see if all else can be had."""
        assert self.site
        self.site.look()
        try:
            return self._claim()
        except NotFound:
            Shared(self.session).setup(self.site.network)
            return self._claim()

    def delete(self) -> None:
        """Delete all of the task's objects, the lease at last."""
        self.store.remove(self.store.keys(""))
        self.release()

    def release(self) -> None:
        """Delete the lease: nobody has the task any more."""
        leases(self.session).delete(self._key)

    def finish(self) -> None:
        """Delete the lease, or leave it to whoever will delete the data."""
        claim = self.claim()
        if claim and claim.keeps and claim.launched:
            leases(self.session).save(self._key, replace(claim, expires=None))
        else:
            self.release()

    def claim(self) -> Claim | None:
        """Read the lease."""
        return leases(self.session).load(self._key, Claim)

    def renew(self, expires: datetime | None) -> None:
        """Write that the task is launched, and until when it may be there."""
        old = self.ours[0] if self.ours else self.claim()
        if old is None:
            msg = f"{self.task.id} is gone: launch it again"
            raise NotFound(msg)
        new = replace(old, expires=expires, launched=True)
        leases(self.session).save(self._key, new)

    def _claim(self) -> bool:
        """Put it with a call which makes sure whose bucket this is: its name can be guessed."""
        now = datetime.now(timezone.utc)
        task = self.task
        content = Claim(created=now, expires=task.expires, tags=dict(task.tags), keeps=task.keeps)
        try:
            self.session.call(
                "s3",
                "put_object",
                Bucket=Shared(self.session).bucket,
                ExpectedBucketOwner=self.session.account.id,
                Key=f"{LEASES}/{self._key}",
                Body=msgspec.json.encode(content),
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

    @property
    def _key(self) -> str:
        return f"{self.task.id}.json"


@dataclass(frozen=True, eq=False)
class Settings:
    """What the machines read; the only thing that is secret."""

    bucket: Bucket
    label: str = "settings"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """Without the lease it might be somebody else's."""
        return (self.bucket,)

    def create(self) -> bool:
        """Write them, once the records of an older task of this name are gone."""
        content = self.bucket.task.settings.encode()
        with ThreadPoolExecutor(1) as pool:
            older = pool.submit(self.bucket.store.keys, "")
            new = self.bucket.store.claim(store.SETTINGS, content)
            if self.bucket.ours:
                for key in older.result():
                    if key != store.SETTINGS:
                        self.bucket.store.delete(key)
                if not new:  # somebody's who didn't clear up
                    self.bucket.store.write(store.SETTINGS, content)
        return new or bool(self.bucket.ours)

    def delete(self) -> None:
        """Delete them, and all else that nobody wants to read when the task is over."""
        self.bucket.store.delete(store.SETTINGS)
        gone = [key for key in self.bucket.store.keys("") if not store.kept(key)]
        self.bucket.store.remove(gone)


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
        script = start_script(task, self.bucket)
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


def start_script(task: Task, bucket: Bucket) -> str:
    """Write the user data: which settings to read and, if they are gone, which task to end."""
    url = f"{bucket.store.url}#aws/{bucket.session.region}/{task.id}"
    return bootstrap.machine(url, task.program, task.expires)


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


def _open(session: Session, prefix: str) -> store.Store:
    name = Shared(session).bucket
    return store.Store(f"s3://{name}/{prefix}?region={session.region}", session.credentials)
