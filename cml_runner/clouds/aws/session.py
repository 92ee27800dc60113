"""Calls to AWS: one session per process and region, and our errors in place of the SDK's."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import installer, times
from cml_runner.checkup import Clock
from cml_runner.errors import (
    AlreadyExists,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NoCredentials,
    NotFound,
    RunnerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import boto3

# Codes and their meaning: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
# and the "Errors" of each Auto Scaling, IAM, S3 and SSM call.
CAPACITY = frozenset(
    {
        *("InsufficientInstanceCapacity", "InsufficientCapacity", "UnfulfillableCapacity"),
        *("InsufficientHostCapacity", "InsufficientFreeAddressesInSubnet", "SpotMaxPriceTooLow"),
        *("Unsupported", "InstanceTypeNotSupported", "ReservationCapacityExceeded"),
    }
)
QUOTA = frozenset(
    {
        *("VcpuLimitExceeded", "MaxSpotInstanceCountExceeded", "InstanceLimitExceeded"),
        *("MaxSpotFleetRequestCountExceeded", "VolumeLimitExceeded", "LimitExceeded"),
        *("LimitExceededException", "NetworkInterfaceLimitExceeded"),
    }
)
PERMISSION = frozenset(
    {
        *("UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "OptInRequired"),
        *("PendingVerification", "Blocked", "AllAccessDisabled", "403"),
    }
)
CREDENTIALS = frozenset(
    {
        *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidClientTokenId"),
        *("UnrecognizedClientException", "AuthFailure", "SignatureDoesNotMatch", "InvalidToken"),
        *("InvalidAccessKeyId", "TokenRefreshRequired", "MissingAuthenticationToken"),
        *("IncompleteSignature", "InvalidSignatureException"),
    }
)
IMAGE = frozenset(
    {
        *("InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable"),
        *("InvalidBlockDeviceMapping", "ParameterNotFound"),
    }
)
EXISTS = re.compile(r"AlreadyExists|\.Duplicate$|^BucketAlreadyOwnedByYou$|^PreconditionFailed$")
TAKEN = "has been taken in this account"  # what IAM says of a service-linked role
ABSENT = re.compile(r"NotFound(Exception)?$|^NoSuch|^404$")
HOMES = {"pricing": "us-east-1"}  # of services that aren't everywhere
FRESH = timedelta(minutes=5)  # before the SDK is asked if its credentials are still good
# Auto Scaling has but one code for all that is wrong with a request.
NO_GROUP = re.compile(r"(AutoScalingGroup|Group|Scheduled action) name not found", re.IGNORECASE)


@dataclass(frozen=True)
class Account:
    """Whose credentials we have."""

    id: str
    partition: str  # aws, aws-cn, aws-us-gov
    who: str = ""  # ARN

    def arn(self, service: str, resource: str, region: str = "") -> str:
        """Name something of this account."""
        return f"arn:{self.partition}:{service}:{region}:{self.id}:{resource}"


class Session:
    """One account in one region. Nothing is imported or sent before the first call."""

    def __init__(self, region: str) -> None:
        self.region = region
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()  # clients are safe among threads, their making isn't
        self._asking = threading.Lock()  # whose account it is
        self._account: Account | None = None
        self.clock = Clock()

    @property
    def account(self) -> Account:
        """Ask once whose credentials these are; that needs no permission."""
        with self._asking:
            if self._account is None:
                found = self.call("sts", "get_caller_identity")
                self._account = Account(found["Account"], found["Arn"].split(":")[1], found["Arn"])
            return self._account

    def now(self) -> datetime:
        """Ask AWS what time it is; that needs no permission."""
        found = self.call("sts", "get_caller_identity")
        return times.of_header(found["ResponseMetadata"]["HTTPHeaders"]["date"])

    def call(self, service: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Make one call; the SDK tries again where that makes sense.

        Raises NotFound, AlreadyExists, NoCapacity, CredentialsError, or RunnerError.
        """
        with translated(service):
            found: dict[str, Any] = getattr(self._client(service), operation)(**arguments)
        return found

    def make(self, service: str, operation: str, **arguments: Any) -> bool:
        """Make a call that makes something; False if it is there already."""
        try:
            self.call(service, operation, **arguments)
        except AlreadyExists:
            return False
        return True

    def pages(self, service: str, operation: str, key: str, **arguments: Any) -> list[Any]:
        """Collect a list which comes in pages."""
        with translated(service):
            pages = self._client(service).get_paginator(operation).paginate(**arguments)
            return [one for page in pages for one in page[key]]

    def endpoint(self, service: str) -> str:
        """Say where a service is."""
        with translated(service):
            return str(self._client(service).meta.endpoint_url)

    def credentials(self) -> dict[str, Any]:
        """Return what signs requests to S3, in obstore's terms; it asks again when they expire."""
        with translated("s3"):
            found = self._session.get_credentials()
            frozen = found.get_frozen_credentials() if found else None
        if frozen is None:
            raise _none()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + FRESH,
        }

    @cached_property
    def _session(self) -> boto3.Session:
        try:
            import boto3
        except ImportError as error:
            raise MissingDependency(installer.lacking("aws")) from error
        with translated(""):
            return boto3.Session(region_name=self.region)

    def _client(self, service: str) -> Any:
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._new(service)
            return self._clients[service]

    def _new(self, service: str) -> Any:
        session = self._session
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": 6},
            connect_timeout=5,
            read_timeout=60,
            user_agent_extra="cml-runner",
        )
        client = session.client(service, region_name=HOMES.get(service), config=config)
        client.meta.events.register("response-received", self._hear)
        return client

    def _hear(self, response_dict: dict[str, Any] | None = None, **_: Any) -> None:
        self.clock.hear((response_dict or {}).get("headers", {}).get("date"))


@contextmanager
def translated(service: str) -> Iterator[None]:
    """Raise our errors in place of the SDK's."""
    try:
        from botocore import exceptions
    except ImportError as error:
        raise MissingDependency(installer.lacking("aws")) from error
    try:
        yield
    except exceptions.ClientError as error:
        details = error.response.get("Error", {})
        code, text = details.get("Code", ""), details.get("Message", "")
        action = f"{service}:{error.operation_name}"
        raise _error(code, text, action) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise _none() from error
    except (
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
        exceptions.SSOError,
        exceptions.UnauthorizedSSOTokenError,
    ) as error:
        msg = f"no AWS credentials: {error}"
        raise CredentialsError(msg) from error
    except exceptions.EndpointConnectionError as error:
        msg = f"can't reach AWS; is the region right, and is there a network? {error}"
        raise RunnerError(msg) from error
    except exceptions.BotoCoreError as error:
        raise RunnerError(str(error)) from error


def kind(code: str) -> str:
    """Say what a code means, in the terms of model.Happening."""
    kinds = {"capacity": CAPACITY, "quota": QUOTA, "permission": PERMISSION | CREDENTIALS}
    for name, codes in {**kinds, "image": IMAGE}.items():
        if code in codes:
            return name
    return "error"


def _error(code: str, text: str, action: str) -> RunnerError:
    text = re.sub(r"\s*Encoded authorization failure message:.*", "", text, flags=re.DOTALL)
    if code in CREDENTIALS:
        msg = (
            f"AWS refuses our credentials: {text} ({code}). Renew them: AWS_ACCESS_KEY_ID,"
            " AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile in AWS_PROFILE"
        )
        return CredentialsError(msg)
    if code in PERMISSION:
        msg = (
            f"not allowed to call {action}: {text} ({code})."
            " What is needed is printed by: cml-runner permissions aws"
        )
        return CredentialsError(msg)
    if code in CAPACITY | QUOTA:
        return NoCapacity(f"{text} ({code})")
    if EXISTS.search(code) or TAKEN in text:
        return AlreadyExists(f"{text} ({code})")
    if ABSENT.search(code) or NO_GROUP.search(text):
        return NotFound(f"{text} ({code})")
    return RunnerError(f"{action}: {text} ({code})")


def _none() -> NoCredentials:
    msg = (
        "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"
        " or, in a CI job, use the provider's OIDC login"
    )
    return NoCredentials(msg)
