"""What we may do: our own least policy, put to AWS's simulator as questions.

https://docs.aws.amazon.com/IAM/latest/APIReference/API_SimulatePrincipalPolicy.html
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cml_runner.boot.aws import TAG
from cml_runner.checkup import allowed
from cml_runner.clouds.aws import account
from cml_runner.errors import CredentialsError, NotFound, RunnerError
from cml_runner.model import Check, Identifier

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cml_runner.clouds.aws.session import Session

HINT = "give them to it: cml-runner permissions aws"
SSH = "only --cloud-ssh-private needs it"
ONLY_SSH = frozenset(
    {
        *("ec2:ImportKeyPair", "ec2:DeleteKeyPair", "ec2:CreateSecurityGroup"),
        "ec2:AuthorizeSecurityGroupIngress",
    }
)
PRICES = "only prices need it: --max-price and --dry-run"
ONLY_PRICES = frozenset({"ec2:DescribeSpotPriceHistory", "pricing:GetProducts"})
NUMBER = "0123456789abcdef0"  # of something that might be
SAMPLES = {  # of what a policy's wildcards stand for; the first that fits
    ":*/*": f":instance/i-{NUMBER}",
    ":image/*": f":image/ami-{NUMBER}",
    ":instance/*": f":instance/i-{NUMBER}",
    ":launch-template/*": f":launch-template/lt-{NUMBER}",
    ":security-group/*": f":security-group/sg-{NUMBER}",
    ":vpc/*": f":vpc/vpc-{NUMBER}",
}
KINDS = {  # of resources, where our policy says "*" but others may say more
    "ec2:CreateLaunchTemplate": "launch-template/*",
    "ec2:DeleteLaunchTemplate": "launch-template/*",
    "ec2:DeleteKeyPair": "key-pair/*",
    "ec2:ImportKeyPair": "key-pair/*",
}
DRY = "DryRunOperation"  # what EC2 answers instead of doing what we may do
AT_ONCE = 4  # calls of the simulator, which is slow to answer many


@dataclass(frozen=True)
class Question:
    """Actions on resources, and what is known of the requests."""

    actions: tuple[str, ...]
    resources: tuple[str, ...]
    context: Mapping[str, str]


def look(session: Session) -> Iterator[Check]:
    """Say which of the permissions that a launch needs we have, as far as AWS tells."""
    if session.account.who.endswith(":root"):
        yield Check(what="permissions", state="ok", message="the account's owner may do everything")
        return
    try:
        source = _source(session)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            refused = pool.map(lambda one: _refused(session, source, one), questions(session))
            missing = sorted({name for several in refused for name in several})
    except (CredentialsError, NotFound) as error:
        yield from _dry(session, error)
        return
    needed = {name for one in questions(session) for name in one.actions}
    yield from allowed([one for one in missing if one in ONLY_SSH], 0, HINT, SSH)
    yield from allowed([one for one in missing if one in ONLY_PRICES], 0, HINT, PRICES)
    seldom = ONLY_SSH | ONLY_PRICES
    yield from allowed([one for one in missing if one not in seldom], len(needed), HINT)


def questions(session: Session) -> Iterator[Question]:
    """Turn each statement of the policy into what is asked about it."""
    own = session.account
    policy = account.launcher_policy(own.id, session.region, own.partition)
    for statement in policy["Statement"]:
        resources = _several(statement["Resource"])
        context = {
            key: _sample(_several(value)[0])
            for pairs in statement.get("Condition", {}).values()
            for key, value in pairs.items()
        }
        for kind, actions in groupby(statement["Action"], KINDS.get):
            named = [own.arn("ec2", kind, session.region)] if kind else resources
            yield Question(tuple(actions), tuple(map(_sample, named)), context)


def _sample(text: str) -> str:
    """Put something where a wildcard stands."""
    for pattern, sample in SAMPLES.items():
        text = text.replace(pattern, sample)
    return text.replace("*", "0") if text != "*" else text


def _source(session: Session) -> str:
    """Name whose policies count: of a role's session they are the role's."""
    who = session.account.who
    if ":assumed-role/" not in who:
        return who
    role = who.partition(":assumed-role/")[2].partition("/")[0]
    try:
        return str(session.call("iam", "get_role", RoleName=role)["Role"]["Arn"])
    except CredentialsError:  # it may have a path in its name, but seldom has
        return session.account.arn("iam", f"role/{role}")


def _refused(session: Session, source: str, question: Question) -> list[str]:
    entries = [
        {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
        for key, value in question.context.items()
    ]
    found = session.pages(
        "iam",
        "simulate_principal_policy",
        "EvaluationResults",
        PolicySourceArn=source,
        ActionNames=list(question.actions),
        ResourceArns=list(question.resources),
        **({"ContextEntries": entries} if entries else {}),
    )
    return [str(one["EvalActionName"]) for one in found if not _granted(one)]


def _granted(result: Mapping[str, Any]) -> bool:
    organization = result.get("OrganizationsDecisionDetail", {})
    allowed_there = organization.get("AllowedByOrganizations", True)
    return result["EvalDecision"] == "allowed" and bool(allowed_there)


def _dry(session: Session, error: RunnerError) -> Iterator[Check]:
    """Ask EC2 to pretend, which it does for some of its calls."""
    name = "ec2:CreateLaunchTemplate"
    identifier = str(Identifier.new("doctor"))
    tags = [{"Key": TAG, "Value": identifier}]
    try:
        session.call(
            "ec2",
            "create_launch_template",
            DryRun=True,
            LaunchTemplateName=identifier,
            LaunchTemplateData={"InstanceType": "t3.small"},
            TagSpecifications=[{"ResourceType": "launch-template", "Tags": tags}],
        )
    except CredentialsError:
        yield from allowed([name], 0, HINT)
    except RunnerError as pretended:
        if DRY in str(pretended):
            message = "allowed, as a dry run says"
            yield Check(what=f"permission {name}", state="ok", message=message)
    message = f"can't be simulated, so nobody knows: {' '.join(str(error).split())}"
    yield Check(what="permissions", state="unknown", message=message)


def _several(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
