"""Tokens of service accounts, verified by the cluster's API (TokenReview). Which workload a pod is, others say."""

from __future__ import annotations

import json

from pki.kubernetes.api import Api
from pki.kubernetes.objects import items_of, mapping, text_of
from proxy.identity import spell_user

PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_ACCOUNT = "system:serviceaccount:"
_POD_UID = "authentication.kubernetes.io/pod-uid"


async def review(api: Api, token: str, audience: str) -> str | None:
    """Who `token` proves its bearer to be, as `identity.spell_user` writes it; None: nobody, or no pod.

    Only a token that is bound to a pod counts: any other can be carried off and shown from anywhere. Raises ApiFault.
    """
    spec = {"token": token, "audiences": [audience]}
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    answer = await api.create(PATH, json.dumps(asked).encode())
    status = mapping(answer.get("status"))
    # A server that knows no audiences leaves them out: then nobody has said that the token was meant for us.
    if status.get("authenticated") is not True or audience not in items_of(status, "audiences"):
        return None
    user = mapping(status.get("user"))
    account, uids = text_of(user, "username"), items_of(mapping(user.get("extra")), _POD_UID)
    namespace, colon, name = account.removeprefix(_ACCOUNT).partition(":")
    if not account.startswith(_ACCOUNT) or not colon or len(uids) != 1 or not isinstance(uids[0], str):
        return None
    return spell_user(namespace, name, uids[0])
