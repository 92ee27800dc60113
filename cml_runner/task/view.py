"""What is known of a task."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from cml_runner import store
from cml_runner.reports import statuses
from cml_runner.task import older
from cml_runner.task.follow import results

if TYPE_CHECKING:
    from cml_runner.inventory import Found


def row(found: Found) -> dict[str, Any]:
    """Describe a task in a line."""
    tags = found.lease.tags if found.lease else {}
    status = counts(found)
    return {
        "id": str(found.id),
        "name": tags.get("name", str(found.id)),
        "cloud": found.place.name,
        "region": found.place.region,
        "status": status,
        "created": _iso(found.lease.created) if found.lease else None,
        "expires": _iso(found.lease.expires) if found.lease else None,
    }


def counts(found: Found) -> dict[str, int]:
    """Count machines per state: running, succeeded, failed, stopped, or queued until they come."""
    if older.is_old(found.id):
        return older.counts(found)
    bucket, count = found.bucket, parallelism(found)
    done = results(bucket, count)
    said = statuses(bucket, count)
    recalled = bucket.read(store.RECALL) is not None
    states = []
    for rank in range(count):
        if rank in done:
            states.append("failed" if done[rank].code else "succeeded")
        elif recalled:
            states.append("stopped")
        else:
            states.append("running" if rank in said else "queued")
    return {state: states.count(state) for state in dict.fromkeys(states)}


def details(found: Found) -> dict[str, Any]:
    """Describe all that is known of a task."""
    bucket, count = found.bucket, parallelism(found)
    group = found.plan.group
    done, said = results(bucket, count), statuses(bucket, count)
    return {
        **row(found),
        "parallelism": count,
        "tags": dict(found.lease.tags) if found.lease else {},
        "addresses": [one.address for one in group.instances() if one.address],
        "machines": [
            {
                "rank": rank,
                "state": one.state,
                "since": _iso(one.since),
                "heartbeat": _iso(one.at),
                "reason": one.reason,
                "code": done[rank].code if rank in done else None,
                "epoch": done[rank].epoch if rank in done else None,
                "program": one.program,
            }
            for rank, one in said.items()
        ],
        "events": [
            {"at": _iso(event.at), "kind": event.kind, "message": event.message}
            for event in group.events()
        ],
    }


def parallelism(found: Found) -> int:
    """Say how many machines it has, or had."""
    return int(found.lease.tags.get("count", "1")) if found.lease else 1


def _iso(at: datetime | None) -> str | None:
    return at.astimezone(timezone.utc).isoformat(timespec="seconds") if at else None
