"""Service accounts that are roles of AWS, as EKS has them: IAM roles for service accounts.

    with Identities(town, aws, "trainer", policy):
        …                                    # pods of the service account trainer may do that much

A policy of the cluster gives pods a token of their own and says which role they have, as EKS's
webhook does; the token service asks the cluster whose token it is.
https://docs.aws.amazon.com/eks/latest/userguide/iam-roles-for-service-accounts.html
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from cml_runner.wait import until
from tests.lab.aws.instances import ACCOUNT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.lab.aws import AWS
    from tests.lab.town import Town

PATIENCE = 60  # seconds
AUDIENCE = "sts.amazonaws.com"
DIRECTORY = "/var/run/secrets/eks.amazonaws.com/serviceaccount"
POLICIES = "/apis/admissionregistration.k8s.io/v1"
NEW_PODS = {
    "apiGroups": [""],
    "apiVersions": ["v1"],
    "operations": ["CREATE"],
    "resources": ["pods"],
}
VOLUME = f"""\
[JSONPatch{{op: "add", path: "/spec/volumes/-", value: Object.spec.volumes{{
  name: "aws-iam-token",
  projected: Object.spec.volumes.projected{{sources: [Object.spec.volumes.projected.sources{{
    serviceAccountToken: Object.spec.volumes.projected.sources.serviceAccountToken{{
      audience: "{AUDIENCE}", expirationSeconds: 3600, path: "token"}}}}]}}}}}}]
"""
CONTAINERS = f"""\
Object{{spec: Object.spec{{
  containers: object.spec.containers.map(one, Object.spec.containers{{
    name: one.name,
    env: [
      Object.spec.containers.env{{name: "AWS_ROLE_ARN", value: "{{arn}}"}},
      Object.spec.containers.env{{
        name: "AWS_WEB_IDENTITY_TOKEN_FILE", value: "{DIRECTORY}/token"}}],
    volumeMounts: [Object.spec.containers.volumeMounts{{
      name: "aws-iam-token", mountPath: "{DIRECTORY}", readOnly: true}}]}})}}}}
"""
ANSWER = """\
<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{id}</AccessKeyId>
<SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{token}</SessionToken>
<Expiration>2100-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>
"""
REFUSAL = """\
<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>InvalidIdentityToken</Code><Message>No OpenIDConnect provider found</Message></Error>
</ErrorResponse>
"""


class Identities:
    """One service account, and its role."""

    def __init__(self, town: Town, aws: AWS, account: str, policy: dict[str, Any]) -> None:
        self._town, self._aws, self._account, self._policy = town, aws, account, policy
        self._name = f"identity-of-{account}-in-{town.name}"
        self._role = f"arn:aws:iam::{ACCOUNT}:role/{account}"

    def __enter__(self) -> Identities:
        self._town.ask("POST", "serviceaccounts", {"metadata": {"name": self._account}})
        here = f"object.metadata.namespace == '{self._town.name}'"
        whose = f"object.spec.serviceAccountName == '{self._account}'"
        volume = {"expression": VOLUME}  # arrays in it are atomic, so it can't be applied
        containers = {"expression": CONTAINERS.replace("{arn}", self._role)}
        spec = {
            "matchConstraints": {"resourceRules": [NEW_PODS]},
            "matchConditions": [{"name": "whose", "expression": f"{here} && {whose}"}],
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [
                {"patchType": "JSONPatch", "jsonPatch": volume},
                {"patchType": "ApplyConfiguration", "applyConfiguration": containers},
            ],
        }
        self._make("mutatingadmissionpolicies", spec)
        self._make("mutatingadmissionpolicybindings", {"policyName": self._name})
        until(self._rules, f"the API server to follow {self._name}", PATIENCE, 0.1)
        self._town.country.internet.serve("amazonaws.com", self)
        return self

    def __exit__(self, *_: object) -> None:
        for kind in ("mutatingadmissionpolicybindings", "mutatingadmissionpolicies"):
            self._town.country.cluster.kubectl("DELETE", f"{POLICIES}/{kind}/{self._name}")

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """Be AWS: whoever asks who they are has no key yet."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        asked = dict(parse_qsl(f"{environ.get('QUERY_STRING', '')}&{body.decode('latin-1')}"))
        if asked.get("Action") == "AssumeRoleWithWebIdentity":
            return self._assume(asked, start)
        return self._aws.app({**environ, "wsgi.input": io.BytesIO(body)}, start)

    def _assume(self, asked: dict[str, str], start: Any) -> Iterable[bytes]:
        spec = {"token": asked["WebIdentityToken"], "audiences": [AUDIENCE]}
        review = "/apis/authentication.k8s.io/v1/tokenreviews"
        found = self._town.country.cluster.kubectl("POST", review, {"spec": spec})["status"]
        who = found.get("user", {}).get("username")
        known = who == f"system:serviceaccount:{self._town.name}:{self._account}"
        fits = known and asked["RoleArn"] == self._role
        text = ANSWER.format(**self._aws.add_user(self._policy)) if fits else REFUSAL
        start("200 OK" if fits else "400 Bad Request", [("Content-Type", "text/xml")])
        return [text.encode()]

    def _rules(self) -> bool:
        """Say if a pod would be given its role: the API server learns of a policy after a while."""
        one = {"name": "one", "image": "none"}
        spec = {"serviceAccountName": self._account, "containers": [one]}
        body = {"metadata": {"generateName": "nobody-"}, "spec": spec}
        made = self._town.ask("POST", "pods?dryRun=All", body)
        return "AWS_ROLE_ARN" in json.dumps(made)

    def _make(self, kind: str, spec: dict[str, Any]) -> None:
        body = {"metadata": {"name": self._name}, "spec": spec}
        self._town.country.cluster.kubectl("POST", f"{POLICIES}/{kind}", body)
