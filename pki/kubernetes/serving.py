"""The certificate of a webhook in a Secret, renewed in time, and its CA in the configuration that names the webhook.

Each certificate has a CA of its own, whose key is forgotten as soon as it has signed: there is nothing to steal, and
nothing else that it could vouch for. Clients are told of the next CA before anybody shows what it signed.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509

from pki.authority import KeyKind, certificates_pem, create_key, create_root, key_pem
from pki.kubernetes.api import Api, ApiFault
from pki.kubernetes.authority import NotOurs
from pki.kubernetes.objects import OURS, OWNER, Json, items_of, mapping, text_of
from pki.layout import FLAT_CHAIN as CHAIN
from pki.layout import FLAT_KEY as KEY
from pki.layout import FLAT_ROOTS as ROOTS
from pki.profile import digest_for, leaf_name, life_from, unsigned_leaf

LIFE = timedelta(days=90)
_NAME = "Outgate webhook"
_WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{}"


@dataclass(frozen=True, slots=True)
class Serving:
    """A certificate with its key, and the CA that signed it; PEM."""

    certificate: bytes
    key: bytes
    root: bytes


def make_serving(host: str, now: datetime) -> Serving:
    """A certificate for `host`, and a CA for it alone. Raises AuthorityError."""
    root = create_root(now, name=_NAME, years=1)
    assert root.key is not None  # just made
    key = create_key(KeyKind.EC_P256)
    life = life_from(now, LIFE, root.certificate)
    unsigned = unsigned_leaf(leaf_name(host), key.public_key(), life, root.certificate)
    leaf = unsigned.sign(root.key, digest_for(root.key))
    return Serving(certificates_pem(leaf), key_pem(key), certificates_pem(root.certificate))


async def keep_serving(
    api: Api, namespace: str, secret: str, host: str, configuration: str | None, now: datetime
) -> bool:
    """Puts a certificate into the Secret where there is none for `host`, or one that has lived for two thirds of its
    time, and the CA into the MutatingWebhookConfiguration; says whether it made one.

    The CA of the former one stays beside, for those who still show it. Raises ApiFault, AuthorityError, NotOurs.
    """
    path = f"/api/v1/namespaces/{namespace}/secrets/{secret}"
    found = await api.look(path)
    held = _held(found, secret)
    if held and not _is_due(held[CHAIN], host, now):
        await _tell(api, configuration, held[ROOTS])
        return False
    made = make_serving(host, now)
    roots = made.root + (_first(held[ROOTS]) if held else b"")
    await _tell(api, configuration, roots)
    version = text_of(mapping(found.get("metadata")), "resourceVersion") if found else ""
    content = {CHAIN: made.certificate, KEY: made.key, ROOTS: roots}
    await api.apply(path, _body(secret, version, content), force=found is not None)
    return True


def _held(found: Json | None, secret: str) -> dict[str, bytes]:
    """What the Secret has; empty where it is to be made. Raises NotOurs."""
    if found is None:
        return {}
    if text_of(mapping(mapping(found.get("metadata")).get("labels")), OWNER) != OURS:
        raise NotOurs(f"secret {secret} is not ours (no label {OWNER}: {OURS}); name another one")
    content = mapping(found.get("data"))
    try:
        held = {key: b64decode(text_of(content, key), validate=True) for key in (CHAIN, KEY, ROOTS)}
    except NotBase64:
        return {}
    return held if all(held.values()) else {}


def _is_due(certificate: bytes, host: str, now: datetime) -> bool:
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return True
    begins, ends = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    return host not in names.get_values_for_type(x509.DNSName) or not begins <= now < begins + (ends - begins) * 2 / 3


def _first(roots: bytes) -> bytes:
    """The CA that is in use. The one before it has nothing left that is valid."""
    try:
        return certificates_pem(x509.load_pem_x509_certificate(roots))
    except ValueError:
        return b""


async def _tell(api: Api, configuration: str | None, roots: bytes) -> None:
    """Raises ApiFault."""
    if configuration is None:
        return
    path = _WEBHOOKS.format(configuration)
    found = await api.look(path)
    if found is None:
        raise ApiFault(f"mutatingwebhookconfiguration {configuration}: there is none of that name", status=404)
    bundle = b64encode(roots).decode()
    webhooks = [mapping(one) for one in items_of(found, "webhooks")]
    if all(text_of(mapping(one.get("clientConfig")), "caBundle") == bundle for one in webhooks):
        return
    told = [{"name": text_of(one, "name"), "clientConfig": {"caBundle": bundle}} for one in webhooks]
    body = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": configuration},
        "webhooks": told,
    }
    await api.apply(path, json.dumps(body).encode(), force=True)


def _body(name: str, version: str, content: Mapping[str, bytes]) -> bytes:
    """With the version that was looked at, so that of two at once one is refused."""
    metadata = {"name": name, "labels": {OWNER: OURS}} | ({"resourceVersion": version} if version else {})
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": metadata,
            "data": {key: b64encode(value).decode() for key, value in content.items()},
        }
    ).encode()
