"""What a launch needs of GitHub, looked at before anything is paid for.

Nothing is changed: where no answer tells what we may write, GitHub is asked to delete the runner,
or to run the job again, with the number 0, which no runner and no job has.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cml_runner import checkup
from cml_runner.checkup import Probe
from cml_runner.errors import CredentialsError, RunnerError
from cml_runner.forges.github import answers
from cml_runner.forges.github.api import NEEDS, VARIABLES
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cml_runner.forges.github.address import Address
    from cml_runner.forges.github.api import Api
    from cml_runner.model import Package

SCOPES = "x-oauth-scopes"  # of classic tokens
EXPIRES = "github-authentication-token-expiration"
FORMATS = ("%Y-%m-%d %H:%M:%S %Z", "%Y-%m-%d %H:%M:%S %z")


def checks(
    api: Api,
    where: Address,
    path: str,
    group: Callable[[], tuple[str, int]] | None,
    packages: Callable[[], Sequence[Package]],
) -> Iterator[Check]:
    """Look at all of it; `path` is that of the runners."""
    forge = _GitHub(api, where, path)
    hint = f"set {VARIABLES}: {NEEDS[where.kind]}"
    found, well = checkup.login(forge.login, api.clock, hint)
    yield from found
    if not well:
        return
    yield from forge.expiry()
    probes = [
        Probe(what="permission to register runners", look=forge.register, hint=hint),
        Probe(what="permission to run jobs again", look=forge.rerun),
        Probe(what="agent", look=lambda: _told(packages()), hint="update cml-runner"),
    ]
    if group:
        what, mend = "runner group", "make it in the settings, or leave --runner-group out"
        probes.append(Probe(what=what, look=lambda: group()[0], hint=mend))
    yield from checkup.made(probes)


class _GitHub:
    def __init__(self, api: Api, where: Address, path: str) -> None:
        self._api, self._where, self._path = api, where, path
        self._scopes: str | None = None
        self._expires = ""

    def login(self) -> str:
        """Say who it is; of installations of Apps GitHub doesn't."""
        try:
            name = self._api.ask("GET", "/user", answers.User).login
        except CredentialsError as error:
            try:
                name = self._installation()
            except CredentialsError:
                raise error from None
        self._scopes = self._api.told.get(SCOPES)
        self._expires = self._api.told.get(EXPIRES, "")
        if self._scopes is not None:
            return f"{name}, by a classic token with the scopes {self._scopes or 'none'}"
        return name

    def expiry(self) -> Iterator[Check]:
        """Say until when, if GitHub does."""
        for one in FORMATS:
            with suppress(ValueError):
                at = datetime.strptime(self._expires, one)
                at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
                yield checkup.expiry(at.astimezone(timezone.utc), datetime.now(timezone.utc))
                return

    def register(self) -> str:
        """With a classic token, who may list runners may make them; others are asked further."""
        self._api.ask("GET", f"{self._path}?per_page=1", object)
        if self._scopes is None:
            self._harmless("DELETE", f"{self._path}/0")
        return f"of {self._where.url}"

    def rerun(self) -> Check | str:
        """See if interrupted jobs can be run again; without that a launch is half of what it is."""
        what = "permission to run jobs again"
        if self._where.kind != "repository":
            message = "each repository has its own, and isn't asked"
            return Check(what=what, state="unknown", message=message)
        try:
            if "repo" not in (self._scopes or "").split(", "):
                path = f"{self._where.prefix}/actions/jobs/0/rerun"
                self._harmless("POST", path, needs="job")
        except CredentialsError as error:
            hint = f"set {VARIABLES}: {NEEDS['job']}; or launch with --no-retry"
            return Check(what=what, state="warning", message=str(error), hint=hint)
        return f"of {self._where.url}"

    def _installation(self) -> str:
        place = self._where.prefix if self._where.kind == "repository" else self._path
        self._api.ask("GET", place, object)
        return f"the GitHub App {self._api.app}" if self._api.app else "an installation's token"

    def _harmless(self, method: str, path: str, needs: str = "") -> None:
        """Ask for something that can't be, and only mind if it's forbidden."""
        try:
            self._api.ask(method, path, object, needs=needs)
        except CredentialsError:
            raise
        except RunnerError:  # it isn't there, of course
            return


def _told(packages: Sequence[Package]) -> str:
    kinds = ", ".join(sorted(one.arch for one in packages))
    return f"version {packages[0].version} for {kinds}"
