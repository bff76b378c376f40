"""Who answered: what shows, from inside, that an answer is the gate's and not that of somebody beyond it.

What a gate says anybody can say: a 403 with its header, a TLS alert, a reset. So none of them counts by itself.
"""

from __future__ import annotations

import socket
import time
from contextlib import closing
from dataclasses import dataclass, replace

from proxy.verify.attempts import attempt, connect
from proxy.verify.model import Heard, Manner, Patience, Probe, Proof
from proxy.verify.place import Place, find_route
from proxy.verify.probes import SINK4, SINK6

MAX_HOPS = 8
_STEP_S = 0.5  # a router that sends no ICMP is waited for no longer


@dataclass(frozen=True, slots=True)
class Witness:
    """What may be believed of answers here.

    hops        routers up to the gate, itself included; None: not known
    has_no_key  a certificate was asked for, and whoever answers could not show the gate's: it is no gate of ours
    """

    place: Place
    hops: int | None = 1
    has_no_key: bool = False

    def prove(self, probe: Probe, heard: Heard, patience: Patience) -> Proof | None:
        """What shows that the gate, or this machine, said what was heard. None: nothing does."""
        if heard.proof is not None:
            return heard.proof
        if self.place.is_closed:
            return Proof.NAMESPACE
        if self.has_no_key:
            return None
        if heard.uid is not None:
            return Proof.MACHINE
        if self.hops is None:
            return None
        route = find_route(probe.to)
        if route is None:
            return None
        if route.gateway is None:
            return Proof.HOPS if self._is_gate_itself(probe, heard, patience) else None
        # A router may refuse when it has counted the hop already; so may the very next machine, and nobody beyond it.
        most = self.hops + (heard.manner is Manner.REJECTED)
        if not self._is_met_within(most, probe, heard, patience):
            return None
        if self.hops > 1 and self._is_met_within(self.hops - 1, probe, heard, patience):
            return None  # somebody nearer than the gate
        return Proof.HOPS

    def is_neighbour(self, probe: Probe) -> bool:
        """Whether no router lies before its address, so that nobody but itself could refuse for it."""
        route = find_route(probe.to)
        return route is not None and route.gateway is None

    def _is_gate_itself(self, probe: Probe, heard: Heard, patience: Patience) -> bool:
        """Whether it is the first router, which answers on that port for addresses that nobody has, too."""
        if self.hops != 1 or probe.to not in self.place.routers:
            return False
        nobody = replace(probe, to=SINK6 if ":" in probe.to else SINK4)
        return self._is_met_within(1, nobody, heard, patience)

    def _is_met_within(self, hops: int, probe: Probe, heard: Heard, patience: Patience) -> bool:
        """Whether the same comes back to packets that live no longer. Over TCP only a connection is made."""
        if probe.is_datagram:
            return attempt(probe, patience, hops=hops).manner is heard.manner
        try:
            connect(probe.to, probe.port, patience, hops).close()
        except ConnectionRefusedError:
            return heard.manner is Manner.REJECTED
        except ConnectionResetError:
            return heard.is_accepted
        except OSError:
            return False
        return heard.is_accepted


def measure(gate: tuple[str, int], patience: Patience) -> int | None:
    """How many hops away the gate at this address is: the fewest that a packet must live to be met by it."""
    step = Patience(_STEP_S, _STEP_S, patience.end)
    for hops in range(1, MAX_HOPS + 1):
        if time.monotonic() >= patience.end:
            return None
        try:
            with closing(connect(*gate, step, hops)):
                return hops
        except (ConnectionRefusedError, ConnectionResetError):
            return hops
        except (OSError, socket.gaierror):
            continue
    return None
