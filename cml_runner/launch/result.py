"""What a launch tells the program that asked for it: what CML printed, and a few more fields."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from cml_runner.launch import Launch


def fields(launched: Launch) -> dict[str, Any]:
    """List what is known of a launch; nothing in it is secret."""
    order, machine = launched.order, launched.order.machine
    return {
        "awsSecurityGroup": machine.options.get("aws-security-group", ""),
        "awsSubnetId": machine.options.get("aws-subnet", ""),
        "cloud": order.cloud,
        "driver": order.access.driver,
        "id": "" if launched.reused else str(order.id),
        "idleTimeout": order.idle_timeout,
        "image": machine.image,
        "instanceGpu": machine.gpu,
        "instanceHddSize": machine.disk,
        "instanceIp": ",".join(_addresses(launched)),
        "instanceLaunchTime": launched.began.isoformat(timespec="seconds"),
        "instanceType": ",".join(machine.types),
        "instancePermissionSet": machine.permissions,
        "kubernetesNodeSelector": machine.options.get("kubernetes-node-selector", ""),
        "labels": ",".join(order.labels),
        "metadata": dict(order.tags),
        "name": launched.reused or order.name,
        "names": [launched.reused] if launched.reused else list(order.names),
        "phases": launched.phases,
        "pricePerHour": launched.price.now,
        "onDemandPricePerHour": launched.price.on_demand,
        "region": launched.region,
        "repo": order.access.url,
        "reused": bool(launched.reused),
        "single": order.single,
        "spot": machine.spot,
        "spotPrice": machine.spot_price,
        "expires": order.expires.isoformat(timespec="seconds") if order.expires else None,
        "timeouts": {"idle": order.idle_timeout, "wait": _finite(order.wait_timeout)},
    }


def plan(launched: Launch) -> dict[str, Any]:
    """List what a launch would create."""
    assert launched.plan
    labels = [resource.label for resource in launched.plan.resources]
    return {**fields(launched), "resources": labels}


def _addresses(launched: Launch) -> list[str]:
    """Ask the cloud; a launch that succeeded doesn't fail if it doesn't say."""
    if not launched.order.wait:  # the machines have just been asked for
        return []
    with suppress(RunnerError):
        instances = launched.plan.group.instances() if launched.plan else []
        return [instance.address for instance in instances if instance.address]
    return []


def _finite(seconds: float) -> float | None:
    return None if seconds == float("inf") else seconds
