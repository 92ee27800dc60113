"""What AWS tells about itself: who somebody is, what they may do, and which quotas there are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from tests.lab.aws import wire
from tests.lab.aws.instances import ACCOUNT
from tests.lab.aws.policies import Request, allowed
from tests.lab.aws.wire import ApiError, Call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.lab.aws import AWS
    from tests.lab.aws.front import Principal

# https://docs.aws.amazon.com/ec2/latest/instancetypes/ec2-instance-quotas.html
QUOTAS = {
    "L-1216C47A": ("Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances", 64),
    "L-34B43A08": ("All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests", 64),
    "L-417A185B": ("Running On-Demand P instances", 0),
    "L-7212CCBC": ("All P4, P3 and P2 Spot Instance Requests", 0),
    "L-C4BD4855": ("All P5 Spot Instance Requests", 192),
    "L-DB2E81BA": ("Running On-Demand G and VT instances", 8),
    "L-3819A6DF": ("All G and VT Spot Instance Requests", 8),
    "L-0263D0A3": ("EC2-VPC Elastic IPs", 5),
}


PRICES = {"m7i.2xlarge": 0.4032, "m7a.2xlarge": 0.46368, "m6i.2xlarge": 0.384}  # on demand


class Oracle:
    """One account's answers."""

    ANSWERS: ClassVar[Mapping[str, Callable[..., Any]]]

    def __init__(self, aws: AWS) -> None:
        self._aws = aws
        self.quotas: dict[str, float] = {code: float(one[1]) for code, one in QUOTAS.items()}
        self.prices: dict[str, float] = dict(PRICES)  # USD per hour, on demand
        self.forbidden: set[str] = set()  # actions that the organisation allows nobody

    def answer(self, call: Call, who: Principal) -> bytes:
        """Answer a call, in its protocol."""
        result = self.ANSWERS[call.action](self, call, who)
        if call.form:
            return wire.answer(call.service, call.action, result)
        service = "pricing" if call.service == "pricing" else "service-quotas"
        return wire.described(service, call.action, result)

    def _products(self, call: Call, _: Principal) -> dict[str, Any]:
        """List what a type costs, and an offer for it that costs nothing by the hour."""
        asked = wire.checked(call)
        wanted = {one["Field"]: one["Value"] for one in asked["Filters"]}
        price = self.prices.get(wanted["instanceType"])
        listed = [] if price is None else [_product(price), _product(0)]
        return {"FormatVersion": "aws_v1", "PriceList": listed}

    def _identity(self, _: Call, who: Principal) -> dict[str, Any]:
        return {"UserId": "AIDAEXAMPLE", "Account": ACCOUNT, "Arn": who.arn}

    def _simulate(self, call: Call, who: Principal) -> dict[str, Any]:
        """Evaluate each action on each resource; only who asks can be simulated here."""
        given = wire.arguments(call)
        if _plain(given["PolicySourceArn"]) != _plain(who.arn):
            raise ApiError("NoSuchEntity", f"{given['PolicySourceArn']} does not exist.", 404)
        context = {
            one["ContextKeyName"]: one["ContextKeyValues"][0]
            for one in given.get("ContextEntries", ())
        }
        results = [
            self._evaluated(who, Request(action, resource, context))
            for action in given["ActionNames"]
            for resource in given.get("ResourceArns", ["*"])
        ]
        return {"EvaluationResults": results, "IsTruncated": False}

    def _evaluated(self, who: Principal, request: Request) -> dict[str, Any]:
        well = who.policies is None or allowed(who.policies(), request)
        return {
            "EvalActionName": request.action,
            "EvalResourceName": request.resource,
            "EvalDecision": "allowed" if well else "implicitDeny",
            "OrganizationsDecisionDetail": {
                "AllowedByOrganizations": request.action not in self.forbidden
            },
        }

    def _quotas(self, call: Call, _: Principal) -> dict[str, Any]:
        assert json.loads(call.body)["ServiceCode"] == "ec2"
        return {
            "Quotas": [
                {
                    "ServiceCode": "ec2",
                    "QuotaCode": code,
                    "QuotaName": QUOTAS[code][0],
                    "Value": value,
                }
                for code, value in self.quotas.items()
            ]
        }


def _plain(arn: str) -> str:
    """Name a role, be it itself or one of its sessions."""
    kind, _, name = arn.rpartition(":")[2].partition("/")
    return name.partition("/")[0] if kind == "assumed-role" else name


def _product(price: float) -> str:
    unit = {"unit": "Hrs", "pricePerUnit": {"USD": f"{price:.10f}"}}
    return json.dumps({"terms": {"OnDemand": {"A.B": {"priceDimensions": {"A.B.C": unit}}}}})


Oracle.ANSWERS = {
    "GetProducts": Oracle._products,
    "GetCallerIdentity": Oracle._identity,
    "SimulatePrincipalPolicy": Oracle._simulate,
    "ListServiceQuotas": Oracle._quotas,
}
