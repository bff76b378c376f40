"""What an API server asks about an object (AdmissionReview v1) and what it is told. Nothing is changed by being asked,
so a dry run is answered as any other."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from enum import StrEnum

import orjson

from proxy.injection.model import Injected, Json, Outcome, Refused, Settings
from proxy.injection.pod import guard_ephemeral, inject

API_VERSION, KIND = "admission.k8s.io/v1", "AdmissionReview"
_MAX_UID = 128
_MAX_WARNINGS, _MAX_WARNING = 16, 250  # characters; an API server cuts them at 256, and at 4 KiB in all


class MalformedReview(Exception):
    """Nothing that could be answered. `str()` says why."""


class Result(StrEnum):
    INJECTED = "injected"
    REFUSED = "refused"
    UNTOUCHED = "untouched"


@dataclass(frozen=True, slots=True)
class Answer:
    """`review` is for the API server; `reason` is that of a refusal, `of` which pod it was, for the log."""

    review: Json
    result: Result
    of: str
    reason: str = ""


def answer(review: object, settings: Settings) -> Answer:
    """Raises MalformedReview where there is no question that an answer could be sent to."""
    request = _request(review)
    outcome = _judge(request, settings)
    return _told(request["uid"], outcome, _of(request))


def _request(review: object) -> Json:
    if not isinstance(review, dict) or review.get("kind") != KIND:
        raise MalformedReview(f"not an {KIND}")
    if review.get("apiVersion") != API_VERSION:
        raise MalformedReview(f"not of {API_VERSION}; say so in admissionReviewVersions")
    request = review.get("request")
    if not isinstance(request, dict):
        raise MalformedReview("request: not an object")
    uid = request.get("uid")
    if not isinstance(uid, str) or not 0 < len(uid) <= _MAX_UID:
        raise MalformedReview("request.uid: not an identifier")
    return request


def _judge(request: Json, settings: Settings) -> Outcome | None:
    """None: nothing that makes a pod."""
    kind, part = request.get("kind"), request.get("subResource") or ""
    if not isinstance(kind, dict) or (kind.get("group") or "", kind.get("kind")) != ("", "Pod"):
        return None
    match request.get("operation"), part:
        case "CREATE", "":
            return inject(request.get("object"), settings)
        case "UPDATE", "ephemeralcontainers":
            return guard_ephemeral(request.get("object"), request.get("oldObject"), settings)
        case _:
            return None


def _told(uid: str, outcome: Outcome | None, of: str) -> Answer:
    response: Json = {"uid": uid, "allowed": not isinstance(outcome, Refused)}
    result = Result.UNTOUCHED
    if isinstance(outcome, Refused):
        result = Result.REFUSED
        status = {"code": 403, "reason": "Forbidden", "message": f"outgate: {outcome.reason}"}
        response["status"] = status
    elif isinstance(outcome, Injected) and outcome.patch:
        result = Result.INJECTED
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(orjson.dumps(outcome.patch)).decode()
        if outcome.warnings:
            response["warnings"] = [f"outgate: {one}"[:_MAX_WARNING] for one in outcome.warnings[:_MAX_WARNINGS]]
    review = {"apiVersion": API_VERSION, "kind": KIND, "response": response}
    return Answer(review, result, of, outcome.reason if isinstance(outcome, Refused) else "")


def _of(request: Json) -> str:
    """NAMESPACE/NAME of what was asked about; a pod of a controller has no name yet."""
    found = request.get("object")
    metadata = found.get("metadata") if isinstance(found, dict) else None
    named = metadata if isinstance(metadata, dict) else {}
    name = request.get("name") or named.get("name") or named.get("generateName") or "?"
    return "".join(c if c.isprintable() else "?" for c in f"{request.get('namespace') or '?'}/{name}")[:200]
