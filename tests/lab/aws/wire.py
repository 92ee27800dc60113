"""The vendor's own description of its API: requests are read and answers are written by it.

botocore carries a machine-readable model of every call. What a request has that the model doesn't
know is refused; what we would answer must satisfy it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape


class ApiError(Exception):
    """What a service answers in place of a result."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, as far as any service's can be told without carrying it out."""

    service: str
    region: str
    action: str
    key: str  # access key
    form: dict[str, str]
    method: str
    host: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def bucket(self) -> str:
        """The bucket that it is about, in its host name or in its path."""
        name = self.host.partition(":")[0]
        if ".s3." in name:
            return name.partition(".s3.")[0]
        return self.path.lstrip("/").partition("/")[0]

    @property
    def object(self) -> str:
        """The object."""
        if ".s3." in self.host:
            return self.path.lstrip("/")
        return self.path.lstrip("/").partition("/")[2]


SUBRESOURCES = {
    "encryption": "EncryptionConfiguration",
    "lifecycle": "LifecycleConfiguration",
    "policy": "BucketPolicy",
    "publicAccessBlock": "BucketPublicAccessBlock",
    "tagging": "BucketTagging",
}


def read(environ: dict[str, Any], body: bytes) -> Call:
    """Tell who asks which service for what."""
    headers = {
        name[5:].replace("_", "-").lower(): str(value)
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    key, region, service = "", "us-east-1", ""
    scope = headers.get("authorization", "").partition("Credential=")[2].split(",")[0].split("/")
    if len(scope) == 5:
        key, _, region, service, _ = scope
    form: dict[str, str] = {}
    action = headers.get("x-amz-target", "").rpartition(".")[2]
    if environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
        form = dict(parse_qsl(body.decode(), keep_blank_values=True))
        action = form.get("Action", "")
    call = Call(
        service=service,
        region=region,
        action=action,
        key=key,
        form=form,
        method=environ["REQUEST_METHOD"],
        host=headers.get("host", ""),
        path=environ.get("PATH_INFO", ""),
        query=environ.get("QUERY_STRING", ""),
        headers=headers,
        body=body,
    )
    return call if service != "s3" else _s3(call)


def _s3(call: Call) -> Call:
    names = dict(parse_qsl(call.query, keep_blank_values=True))
    what = "Object"
    if not call.object:
        what = next((name for key, name in SUBRESOURCES.items() if key in names), "Bucket")
    verb = {"GET": "Get", "HEAD": "Get", "PUT": "Put", "DELETE": "Delete", "POST": "Delete"}
    action = verb[call.method] + what
    if what == "Bucket":
        action = {"GET": "ListBucket", "HEAD": "ListBucket", "PUT": "CreateBucket"}.get(
            call.method, "DeleteObject"
        )
    return Call(**{**vars(call), "action": action})


def arguments(call: Call) -> dict[str, Any]:
    """Read a request of the query protocol. Raises ApiError if it isn't as described."""
    operation = _model(call.service).operation_model(call.action)
    taken = {"Action", "Version"}
    found = _parse(operation.input_shape, "", call.form, taken)
    if unknown := sorted(set(call.form) - taken):
        raise ApiError("ValidationError", f"unknown parameters: {', '.join(unknown)}")
    _check(found, operation.input_shape, "the request")
    return found or {}


def answer(service: str, action: str, result: dict[str, Any]) -> bytes:
    """Write an answer of the query protocol, or of EC2's dialect. It must be as described."""
    operation = _model(service).operation_model(action)
    shape, ec2 = operation.output_shape, service == "ec2"
    if shape:
        _check(result, shape, "our answer")
    inner = _write(shape, result, ec2) if shape else ""
    if ec2:
        text = f"<{action}Response><requestId>fake</requestId>{inner}</{action}Response>"
    else:
        text = (
            f"<{action}Response><{action}Result>{inner}</{action}Result>"
            f"<ResponseMetadata><RequestId>fake</RequestId></ResponseMetadata></{action}Response>"
        )
    return text.encode()


def described(service: str, action: str, result: dict[str, Any]) -> bytes:
    """Write an answer of the JSON protocol. It must be as described."""
    _check(result, _model(service).operation_model(action).output_shape, "our answer")
    return json.dumps(result).encode()


def refusal(call: Call, error: ApiError) -> bytes:
    """Write an error as this service does."""
    code, message = escape(error.code), escape(error.message)
    if call.headers.get("x-amz-target"):
        return json.dumps({"__type": error.code, "message": error.message}).encode()
    if call.service == "ec2":
        text = (
            f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            "</Errors><RequestID>fake</RequestID></Response>"
        )
    elif call.service == "s3":
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    else:
        text = (
            f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code>"
            f"<Message>{message}</Message></Error><RequestId>fake</RequestId></ErrorResponse>"
        )
    return text.encode()


@cache
def _model(service: str) -> Any:
    import botocore.loaders
    import botocore.model

    loader = botocore.loaders.create_loader()
    return botocore.model.ServiceModel(loader.load_service_model(service, "service-2"), service)


def _check(values: Any, shape: Any, what: str) -> None:
    from botocore.validate import ParamValidator

    report = ParamValidator().validate(values or {}, shape)
    if report.has_errors():
        msg = f"{what} isn't as described: {report.generate_report()}"
        raise ApiError("ValidationError", msg)


def _parse(shape: Any, prefix: str, form: dict[str, str], taken: set[str]) -> Any:
    """Return what stands in the form at this place; None if nothing does."""
    if shape is None:
        return {}
    if shape.type_name == "structure":
        found = {
            name: _parse(member, f"{prefix}.{name}".lstrip("."), form, taken)
            for name, member in shape.members.items()
        }
        found = {name: value for name, value in found.items() if value is not None}
        return found or ({} if not prefix else None)
    if shape.type_name == "list":
        several: list[Any] = []
        while (
            one := _parse(shape.member, f"{prefix}.member.{len(several) + 1}", form, taken)
        ) is not None:
            several.append(one)
        return several or None
    if prefix not in form:
        return None
    taken.add(prefix)
    return _value(shape, form[prefix])


def _value(shape: Any, text: str) -> Any:
    if shape.type_name in ("integer", "long"):
        return int(text)
    if shape.type_name == "boolean":
        return text == "true"
    if shape.type_name == "timestamp":
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    return text


def _write(shape: Any, value: Any, ec2: bool) -> str:
    if shape.type_name == "structure":
        parts = []
        for name, member in shape.members.items():
            if name in value and value[name] is not None:
                tag = member.serialization.get("name", name) if ec2 else name
                parts.append(f"<{tag}>{_write(member, value[name], ec2)}</{tag}>")
        return "".join(parts)
    if shape.type_name == "list":
        tag = "item" if ec2 else "member"
        return "".join(f"<{tag}>{_write(shape.member, one, ec2)}</{tag}>" for one in value)
    if shape.type_name == "timestamp":
        return f"{value.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
    if shape.type_name == "boolean":
        return "true" if value else "false"
    if shape.type_name == "blob":
        return base64.b64encode(value).decode()
    return escape(str(value))
