"""Tokens: JWTs for one service, as Azure's are, but for the signature, which is a secret."""

from __future__ import annotations

import base64
import json
import secrets
import time

TENANT = "11111111-2222-3333-4444-555555555555"
STORAGE, MANAGER = "https://storage.azure.com", "https://management.azure.com"  # services
LIFE = 86400  # seconds


def signed(service: str, who: str = "owner") -> str:
    """Make one, for somebody."""
    now = int(time.time())
    claims = {
        "aud": service,
        "iss": f"https://sts.windows.net/{TENANT}/",
        "tid": TENANT,
        "appid": who,
        "iat": now,
        "nbf": now,
        "exp": now + LIFE,
    }
    plain = [json.dumps(one).encode() for one in ({"typ": "JWT", "alg": "RS256"}, claims)]
    parts = [base64.urlsafe_b64encode(one) for one in (*plain, secrets.token_bytes(24))]
    return b".".join(parts).decode().replace("=", "")


def audience(token: str) -> str:
    """Say for which service it is."""
    part = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return str(claims["aud"])
