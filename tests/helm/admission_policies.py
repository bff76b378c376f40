"""The chart's admission policies as `outgate inject` prints them, with a place for each value: `python -m
tests.helm.admission_policies` writes them."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import product
from pathlib import Path
from typing import Any

from proxy.commands.inject import dumped
from proxy.injection.admission_policy import objects
from proxy.injection.model import Settings
from tests.helm.rendering import CHART

PLACE = CHART / "files" / "admission-policy"


def of_a_release(settings: Settings, name: str, namespace: str, injects: str, labels: object) -> list[dict[str, Any]]:
    """As the chart has them: with names of its own, for namespaces that name this release, and never for the gate's."""
    made = objects(settings)
    for one in made:
        one["metadata"] = {"name": name, "labels": labels}
        if "policyName" in one["spec"]:
            one["spec"]["policyName"] = name
            continue
        matched = one["spec"]["matchConstraints"]["namespaceSelector"]
        matched["matchLabels"][settings.label] = injects
        [excluded] = matched["matchExpressions"]
        excluded["values"] = [*excluded["values"], namespace]
    return made


def written() -> dict[Path, str]:
    """Every file as it should be."""
    return {
        PLACE / f"{'trust' if trust else 'no-trust'}{'-authority' if authority else ''}.yaml": _with_places(
            trust, authority
        )
        for trust, authority in product((True, False), repeat=2)
    }


def _with_places(trust: bool, authority: bool) -> str:
    settings = Settings(
        image="@image@",
        pull_policy="@pull@",
        policy="@policy@",
        policy_keys=("@key@",),
        trust="@trust@" if trust else None,
        trust_path="/@mount@",
        authority="@authority@" if authority else None,
        bind="@bind@[::]",
        cluster_dns=(ip_address("192.0.2.99"),),
        label="@label@",
    )
    return dumped(of_a_release(settings, "@name@", "@namespace@", "@injects@", "@labels@"))


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
