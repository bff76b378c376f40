"""A container of the workload as it must be for the guard to hold. What it must not be is in `refusals`."""

from __future__ import annotations

from proxy.injection.model import Json
from proxy.injection.reading import mapping, words
from proxy.injection.refusals import DROPPED


def confine(container: Json, where: str) -> None:
    """Takes away what leads round the gate, in place. Raises Unfit."""
    context = dict(mapping(container, "securityContext", where))
    capabilities = dict(mapping(context, "capabilities", f"{where}securityContext."))
    dropped = words(capabilities, "drop", f"{where}securityContext.capabilities.")
    if "ALL" not in dropped:
        capabilities["drop"] = [*dropped, *(name for name in DROPPED if name not in dropped)]
    context["capabilities"] = capabilities
    # Without it a set-uid file that belongs to the gate's uid, made with CAP_CHOWN or part of the image, is the gate.
    context["allowPrivilegeEscalation"] = False
    container["securityContext"] = context
