"""Launch runners, here or on a cloud, and wait until they are ready."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import msgspec

from cml_runner import clouds, steps, store
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    NoCapacity,
    NotFound,
    NotReady,
    RunnerError,
)
from cml_runner.launch import prices, readiness
from cml_runner.launch.prices import Beside, Price
from cml_runner.model import Settings, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cml_runner.clouds import Plan
    from cml_runner.forges import Forge
    from cml_runner.launch.options import Order
    from cml_runner.model import Machine, Registration, Runner

log = logging.getLogger(__name__)

USER = "runner"  # the account of agents and jobs, where we may make one


@dataclass
class Launch:
    """What became of an order; `reused` names a runner which was there already."""

    order: Order
    region: str = ""
    plan: Plan | None = None
    began: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    phases: dict[str, float] = field(default_factory=dict)  # seconds
    reused: str = ""
    price: Price = field(default_factory=Price)  # as far as it is known

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the launch."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            self.phases[name] = round(self.phases.get(name, 0) + spent, 3)


def settings(order: Order, forge: Forge) -> Settings:
    """Say all that a supervisor must know: the credential is secret, and a proxy's login."""
    return Settings(
        id=order.id,
        driver=order.access.driver,
        repo=forge.url,
        names=order.names,
        labels=order.labels,
        credential=order.access.credential,
        group=order.access.group,
        packages=tuple(forge.packages()),
        single=order.single,
        retry=order.retry,
        idle_timeout=order.idle_timeout,
        expires=order.expires,
        workdir=order.workdir or ("" if order.cloud else f"~/.cml/{order.name}"),
        startup=order.startup,
        sudo=order.sudo,
        docker=order.docker,
        docker_volumes=order.docker_volumes,
        authorities=order.authorities,
        proxies=order.proxies,
    )


def prepare(order: Order) -> tuple[Forge, Runner | None]:
    """Make sure that the forge takes us; return the runner which makes a launch needless.

    What makes no sense to the cloud is found out first, since nothing has to be sent for that.
    """
    _understood(order)
    forge = order.access.forge()
    forge.check(order.labels)
    return forge, find(forge.runners(), order)


def launch(order: Order, tell: Callable[[str], None]) -> Launch:
    """Launch on a cloud, unless a runner which will do is there already.

    `tell` gets a line whenever there is something new to show while waiting. Raises whatever
    hinders it, after deleting all that this call has created.
    """
    launched = Launch(order)
    with launched.phase("check"):
        forge, found = prepare(order)
        if found:
            launched.reused = found.name
            return launched
        wanted = settings(order, forge)
    attempts = [(one, region) for one in _markets(order.machine) for region in order.regions]
    for number, (machine, region) in enumerate(attempts, 1):
        launched.order = replace(order, machine=machine)
        try:
            _in_region(launched, region, forge, wanted, tell)
        except NoCapacity as error:
            if number == len(attempts):
                raise
            after, place = attempts[number]
            market = "spot" if after.spot else "on demand"
            log.warning("%s: %s; trying %s, %s", region, error, place, market)
        else:
            break
    return launched


def _markets(machine: Machine) -> list[Machine]:
    """Say what to try in all regions, one after the other."""
    if machine.spot and machine.spot_fallback:
        return [machine, replace(machine, spot=False)]
    return [machine]


def find(runners: Sequence[Runner], order: Order) -> Runner | None:
    """Find a runner which makes a launch needless. Raises AlreadyExists if it's in the way."""
    for runner in runners:
        named = runner.name in (order.name, *order.names)
        fits = named or frozenset(order.labels) <= runner.labels
        if runner.online and fits and (order.reuse or (order.reuse_idle and not runner.busy)):
            log.info("%s is online: nothing is launched", runner.name)
            return runner
        if runner.online and named:
            msg = f"a runner named {runner.name} is online: use --reuse, or another --name"
            raise AlreadyExists(msg)
    return None


def price(order: Order, region: str) -> Price:
    """Ask what a launch costs in one region. Raises NoCapacity if that is too much."""
    try:
        quotes = clouds.load(order.cloud, region).quotes(_task(order, None))
    except RunnerError as error:
        log.debug("%s", error)
        quotes = []
    found = prices.of(quotes, order.count)
    if order.max_price is not None:
        prices.check(found, order.max_price, region)
    return found


def plan(order: Order, region: str, content: Settings | None = None) -> Plan:
    """Say what a launch needs in one region; nothing is changed."""
    return clouds.load(order.cloud, region).plan(_task(order, content))


def _task(order: Order, content: Settings | None) -> Task:
    own = {
        "name": order.name,
        "count": str(order.count),
        "repo": order.access.url,
        "labels": ",".join(order.labels),
    }
    return Task(
        id=order.id,
        settings=msgspec.json.encode(content).decode() if content else "",
        machine=order.machine,
        program=order.program,
        count=order.count,
        expires=order.expires,
        tags={**order.tags, **own},
    )


def _understood(order: Order) -> None:
    mistakes: dict[str, None] = {}
    for region in order.regions if order.cloud else ():
        try:
            plan(order, region)
        except ConfigurationError as error:
            mistakes |= dict.fromkeys(error.mistakes)
    if mistakes:
        raise ConfigurationError(*mistakes)


def _in_region(
    launched: Launch, region: str, forge: Forge, wanted: Settings, tell: Callable[[str], None]
) -> None:
    order = launched.order
    if order.max_price is not None:
        with launched.phase("price"):
            launched.price = price(order, region)
    own = clouds.load(order.cloud, region).dedicated
    wanted = replace(wanted, cloud=order.cloud, region=region, user=USER if own else "")
    once = order.single and not order.machine.spot and forge.one_time  # design 5
    found = plan(order, region, replace(wanted, credential=None) if once else wanted)
    launched.plan, launched.region = found, region
    if not _created(launched, found):
        launched.reused = order.name
        readiness.wait(order, found, forge, tell, guest=True)
        return
    names = order.names if once else ()
    with (
        _undone(found),
        launched.phase("online"),
        _registered(order, forge, names, found.arch) as registrations,
    ):
        if registrations:
            content = replace(wanted, credential=None, registrations=registrations)
            found.bucket.store.save(store.SETTINGS, content)
        found.group.resize(order.count)
        with suppress(NotFound):  # a machine that fails, or has its only job done, is faster
            found.group.expire(order.expires)  # the last step of a launch: design 3
        if order.wait:
            asking = _ask_beside(launched, region)  # design 66
            readiness.wait(order, found, forge, tell)
            launched.price = asking.price
            prices.record(launched.price, launched.began, found.bucket.store)


def _ask_beside(launched: Launch, region: str) -> Beside:
    """Ask what it costs while everybody waits for the machines."""
    known = launched.price
    asking = Beside(lambda: known if known.now is not None else price(launched.order, region))
    asking.start()
    return asking


def _created(launched: Launch, found: Plan) -> bool:
    """Create everything; False if somebody else is at it, and that will do."""
    order = launched.order
    try:
        with launched.phase("create"):
            steps.create(found.resources, claim=found.bucket)
    except AlreadyExists as error:
        if order.reuse or order.reuse_idle:
            log.info("%s is being launched by somebody else: waiting for it", order.name)
            return False
        msg = f"{order.name} is being launched, or was left behind: {error}. To remove it: "
        raise AlreadyExists(f"{msg}cml-runner destroy {order.id}") from error
    return True


@contextmanager
def _registered(
    order: Order, forge: Forge, names: Sequence[str], arch: str
) -> Iterator[tuple[Registration, ...]]:
    """Register machines of one job here, so that they never see the forge's credential.

    Spot machines do: one that comes in an interrupted one's place must register by itself.
    Nobody registers a name before the claim on it is theirs.
    """
    done: list[Registration] = []
    try:
        for name in names:
            done.append(
                forge.register(name, order.labels, single=True, arch=arch, expires=order.expires)
            )
        yield tuple(done)
    except BaseException:
        with steps.uninterrupted():
            _unregister(forge, [one.name for one in done])
        raise


@contextmanager
def _undone(found: Plan) -> Iterator[None]:
    """Leave nothing behind that costs money when the launch fails now, or is given up."""
    try:
        yield
    except BaseException as error:
        log.warning("deleting what was launched")
        with steps.uninterrupted():
            steps.delete(found.resources)
        if isinstance(error, NotReady):
            msg = f"{error}; everything that was launched is deleted"
            raise NotReady(msg) from error
        raise


def _unregister(forge: Forge, names: Sequence[str]) -> None:
    try:
        for runner in forge.runners() if names else ():
            if runner.name in names:
                forge.unregister(runner)
    except RunnerError as error:
        log.warning("%s may still be registered: %s", ", ".join(names), error)
