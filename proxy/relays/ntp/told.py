"""What a running relay tells over its admin port, read back into values. It asks, and changes nothing."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from proxy.record import Peer, show_peer

TIMEOUT_S = 10.0
MAX_PAGE = 4 << 20  # bytes

_ESTIMATE = {
    "offset_s": "outgate_ntp_offset_seconds",
    "root_delay_s": "outgate_ntp_root_delay_seconds",
    "root_dispersion_s": "outgate_ntp_root_dispersion_seconds",
    "stratum": "outgate_ntp_stratum",
    "rate": "outgate_ntp_clock_rate",
}
_SOURCE = {
    "offset_s": "offset_seconds",
    "delay_s": "delay_seconds",
    "stratum": "stratum",
    "reach": "reach",
    "poll_s": "poll_seconds",
    "age_s": "age_seconds",
    "nts": "nts",
    "nts_cookies": "nts_cookies",
}


class NoRelay(Exception):
    """No relay answers there. `str()` is one line: where, what, repair."""


@dataclass(frozen=True, slots=True)
class Told:
    """How a relay stands. `estimate` is empty while there is none; a number that is not known is None."""

    ready: bool
    because: tuple[str, ...]
    notes: tuple[str, ...]
    estimate: Mapping[str, float]
    clients: int
    answers: int
    drops: Mapping[str, int]
    sources: tuple[Mapping[str, object], ...]

    @property
    def error_s(self) -> float:
        """What the time that it gives may be wrong by at most."""
        return self.estimate["root_delay_s"] / 2 + self.estimate["root_dispersion_s"]

    def as_json(self) -> dict[str, object]:
        return {
            "ready": self.ready,
            "because": list(self.because),
            "notes": list(self.notes),
            "estimate": dict(self.estimate) or None,
            "clients": self.clients,
            "answers": self.answers,
            "drops": dict(self.drops),
            "sources": [dict(source) for source in self.sources],
        }


def ask_relay(address: Peer) -> Told:
    """Raises NoRelay."""
    try:
        readiness = json.loads(_fetch(address, "/readyz"))
        samples = _samples(text_string_to_metric_families(_fetch(address, "/metrics")))
        return _read(readiness, samples)
    except OSError as error:
        what = (error.strerror or str(error) or "no answer").lower()
        raise NoRelay(f"{show_peer(address)}: {what}; name the relay's --admin") from error
    except (http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise NoRelay(f"{show_peer(address)}: what answers there is no relay; name the relay's --admin") from error


def _fetch(address: Peer, path: str) -> str:
    connection = http.client.HTTPConnection(address[0], address[1], timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Host": show_peer(address)})
        return connection.getresponse().read(MAX_PAGE).decode()
    finally:
        connection.close()


def _samples(families: Iterable[Metric]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def _read(readiness: Mapping[str, object], samples: Mapping[str, list[Sample]]) -> Told:
    """Raises KeyError, ValueError, TypeError for what no relay says."""
    because, notes = readiness["because"], readiness["notes"]
    if not isinstance(because, list) or not isinstance(notes, list):
        raise TypeError("no list of reasons")
    names = _ESTIMATE if _ESTIMATE["stratum"] in samples else {}
    return Told(
        ready=readiness["ready"] is True,
        because=tuple(map(str, because)),
        notes=tuple(map(str, notes)),
        estimate={key: samples[name][0].value for key, name in names.items()},
        clients=int(samples["outgate_ntp_clients"][0].value),
        answers=int(sum(sample.value for sample in samples["outgate_ntp_answers_total"])),
        drops={sample.labels["reason"]: int(sample.value) for sample in samples["outgate_ntp_drops_total"]},
        sources=tuple(_source(sample, samples) for sample in samples["outgate_ntp_source_state"]),
    )


def _source(state: Sample, samples: Mapping[str, list[Sample]]) -> dict[str, object]:
    key = {label: state.labels[label] for label in ("server", "seat")}

    def of(name: str) -> list[Sample]:
        return [sample for sample in samples.get(f"outgate_ntp_{name}", ()) if key.items() <= sample.labels.items()]

    numbers = {word: next((sample.value for sample in of(f"source_{name}")), None) for word, name in _SOURCE.items()}
    return {
        **key,
        "address": state.labels["address"],
        "state": state.labels["state"],
        **numbers,
        "polls": sum(int(sample.value) for sample in of("polls_total")),
        "failures": {one.labels["reason"]: int(one.value) for one in of("poll_failures_total") if one.value},
    }
