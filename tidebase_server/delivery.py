"""One try to deliver a webhook: signed, posted, and judged by the status of the answer."""

from __future__ import annotations

import base64
import hmac
import time
from contextlib import suppress
from typing import Any, NamedTuple

import requests

from .exchange import Exchange, TargetRefused


class Outcome(NamedTuple):
    """What became of one try, as settle_webhook of schema.sql takes it."""

    delivered: bool
    retryable: bool
    http_status: int | None = None
    response: str | None = None
    error: str | None = None


def deliver(webhook: dict[str, Any], exchange: Exchange, app_secret: str, version: str) -> Outcome:
    """Post a webhook.

    :param webhook: as claim_webhooks of schema.sql answers it.
    :param app_secret: TIDEBASE_WEBHOOK_SECRET. It signs the webhooks to the app itself, recovery and push, when the run
        has no secret of its own. A channel without a secret is not signed.
    :raises Cut: the exchange was ended from outside before there was a status.
    """
    body = webhook["body"].encode()
    now = int(time.time())
    headers = {"content-type": "application/json", "user-agent": f"tidebase/{version}",
               "webhook-id": webhook["id"], "webhook-timestamp": str(now)}
    secret = webhook["secret"] or (app_secret if webhook["kind"] != "channel" else "")
    if secret:
        headers |= sign(body, secret, webhook["id"], now)
    try:
        status, text = exchange.post(webhook["url"], body, headers)
    except TargetRefused as refusal:
        return Outcome(False, False, error=str(refusal))
    except (ValueError, requests.RequestException) as error:
        # A ValueError before there was a connection: the URL is no address, and will be none at the next try.
        is_malformed = isinstance(error, ValueError) and not exchange.has_connected
        return Outcome(False, not is_malformed, error=type(error).__name__)
    delivered = 200 <= status < 300
    return Outcome(delivered, status in (408, 429) or status >= 500, status, text,
                   None if delivered else f"HTTP {status}")


def sign(body: bytes, secret: str, delivery_id: str, timestamp: int) -> dict[str, str]:
    """The signature headers: ours, HMAC-SHA256 over the body, and that of the Standard Webhooks specification, over
    id, timestamp and body. For the latter a secret that begins with whsec_ is base64, as that specification has it."""
    key = secret.encode()
    standard_key = key
    if secret.startswith("whsec_"):
        with suppress(ValueError):
            standard_key = base64.b64decode(secret.removeprefix("whsec_"), validate=True) or key
    signed = b"%s.%d.%s" % (delivery_id.encode(), timestamp, body)
    standard = base64.b64encode(hmac.digest(standard_key, signed, "sha256")).decode()
    return {"x-tidebase-signature": "sha256=" + hmac.digest(key, body, "sha256").hex(),
            "webhook-signature": f"v1,{standard}"}
