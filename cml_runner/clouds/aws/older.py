"""Tasks of terraform-provider-iterative: they are listed and deleted, and nothing else.

Everything of one has its identifier as a name: a bucket, a security group, a key pair, a launch
template and an Auto Scaling group (task/aws/resources of that project).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cml_runner import clouds
from cml_runner.clouds.aws.group import Group
from cml_runner.clouds.aws.resources import Bucket, KeyPair, LaunchTemplate
from cml_runner.errors import ConfigurationError, CredentialsError, NotFound
from cml_runner.model import OLDER, Identifier, Lease
from cml_runner.store import Store

if TYPE_CHECKING:
    from cml_runner.clouds import Resource
    from cml_runner.clouds.aws.session import Session
    from cml_runner.model import Task

log = logging.getLogger(__name__)

OLDEST = "us-east-1"  # which has no name where buckets are


def tasks(session: Session) -> list[Lease]:
    """List those of this region, by their buckets; none if we may not list buckets.

    What a bucket's name must be is so strict that nobody else's is taken for one.
    """
    try:
        listed = session.call("s3", "list_buckets", Prefix=f"{OLDER}-")["Buckets"]
    except CredentialsError as error:
        log.debug("tasks of terraform-provider-iterative aren't listed: %s", error)
        return []
    found = []
    for one in listed:
        with suppress(ConfigurationError, NotFound, CredentialsError):
            identifier = Identifier.parse(one["Name"])
            if identifier.prefix == OLDER and _region(session, one["Name"]) == session.region:
                tags = {"kind": "task", "name": identifier.name, "count": "1"}
                found.append(
                    Lease(id=identifier, created=one["CreationDate"], tags=tags, keeps=True)
                )
    return found


def plan(session: Session, task: Task) -> clouds.Plan:
    """Name all that there may be of one, to be deleted."""
    data = Data(task, session, None)
    barrier = SecurityGroup(data)
    key = KeyPair(data)
    template = LaunchTemplate(data, None, key)
    group = Group(data, None, (barrier, key, template))
    resources = (data, barrier, key, template, group)
    return clouds.Plan(resources=resources, group=group, bucket=data)


def _region(session: Session, bucket: str) -> str:
    found = session.call("s3", "get_bucket_location", Bucket=bucket)
    return str(found.get("LocationConstraint") or OLDEST)


@dataclass(frozen=True, eq=False)
class Data(Bucket):
    """A bucket of the task's own."""

    @property
    def name(self) -> str:
        """The task's."""
        return str(self.task.id)

    @cached_property
    def store(self) -> Store:
        """All that is in it."""
        url = f"s3://{self.name}?region={self.session.region}"
        return Store(url, self.session.credentials)

    def create(self) -> bool:
        """Refuse: there won't be any new ones."""
        msg = f"{self.name} is a task of terraform-provider-iterative: it can only be deleted"
        raise ConfigurationError(msg)

    def delete(self) -> None:
        """Empty it, and delete it."""
        self.store.remove(self.store.keys(""))
        with suppress(NotFound):
            self.session.call("s3", "delete_bucket", Bucket=self.name)


@dataclass(frozen=True, eq=False)
class SecurityGroup:
    """What let in whom."""

    bucket: Data
    label: str = "security group"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """The bucket, by which the task is found, goes last."""
        return (self.bucket,)

    def create(self) -> bool:
        """Make none."""
        return False

    def delete(self) -> None:
        """Delete it."""
        filters = [{"Name": "group-name", "Values": [self.bucket.name]}]
        found = self.bucket.session.call("ec2", "describe_security_groups", Filters=filters)
        for one in found["SecurityGroups"]:
            with suppress(NotFound):
                self.bucket.session.call("ec2", "delete_security_group", GroupId=one["GroupId"])
