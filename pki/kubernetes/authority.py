"""An authority in a Secret: made where there is none, and never replaced. How pods use it, it does not know."""

from __future__ import annotations

import json
import secrets
from base64 import b64encode

from pki.authority import Authority, certificates_pem, key_pem
from pki.kubernetes.api import Api, ApiFault
from pki.kubernetes.objects import OURS, OWNER, mapping
from pki.layout import FLAT_CHAIN, FLAT_KEY, FLAT_ROOTS

ROOT_KEY = "root.key"  # no pod mounts it


class NotOurs(Exception):
    """A Secret of that name holds something else. `str()` has the name and the repair."""


async def keep_authority(api: Api, namespace: str, name: str, authority: Authority) -> bool:
    """Puts `authority` into the Secret; False where it holds one already. Raises ApiFault, NotOurs.

    Server-side apply: it asks for the right to this one name, where `create` would need it for every Secret. Each
    call is another field manager, so that of two at once the later one is refused instead of replacing a key.
    """
    path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
    if await _stands(api, path, name):
        return False
    try:
        await api.apply(path, _body(name, authority), force=False, manager=f"outgate-{secrets.token_hex(8)}")
    except ApiFault as fault:
        if fault.status == 409 and await _stands(api, path, name):
            return False
        raise
    return True


async def _stands(api: Api, path: str, name: str) -> bool:
    found = await api.look(path)
    if found is None:
        return False
    if missing := [key for key in (FLAT_CHAIN, FLAT_KEY, FLAT_ROOTS) if key not in mapping(found.get("data"))]:
        raise NotOurs(f"secret {name} lacks {', '.join(missing)}; name another one, or put the CA there")
    return True


def _body(name: str, authority: Authority) -> bytes:
    issuing = authority.issuer
    held = {
        FLAT_CHAIN: certificates_pem(*issuing.chain),
        FLAT_KEY: key_pem(issuing.key),
        FLAT_ROOTS: certificates_pem(*authority.trusted),
        ROOT_KEY: b"".join(key_pem(root.key) for root in authority.roots if root.key),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": {"name": name, "labels": {OWNER: OURS}},
            "data": {key: b64encode(content).decode() for key, content in held.items()},
        }
    ).encode()
