"""`outgate inject`: a gate in every pod of a file; what becomes of a pod is decided in `proxy/injection`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.commands import NO, NOT_STARTED, USAGE
from proxy.commands.injecting import read_settings, settings_options

if TYPE_CHECKING:
    from proxy.injection.model import Json, Settings

MAX_FILE = 32 << 20
MAX_DEPTH = 100

EPILOG = """\b
Takes Pod, Deployment, ReplicaSet, StatefulSet, DaemonSet, Job, CronJob, PodTemplate, ReplicationController and List,
in any number of documents; everything else is printed as it is. Comments are lost. What is injected already is
brought up to date.
Exit codes: 0 printed; 1 some pod cannot be guarded: nothing is printed, and each reason is said; 2 usage; 3 could not
read.

\b
Example:
  outgate inject --image outgate:0.1.0 -f deployment.yaml | kubectl apply -f -
  outgate inject --image outgate:0.1.0 --admission-policy | kubectl apply -f -
"""


@click.command(epilog=EPILOG)
@click.option(
    "-f", "--file", "files", multiple=True, metavar="FILE", help="YAML or JSON; - is standard input. Repeatable."
)
@click.option(
    "--admission-policy",
    "is_policy",
    is_flag=True,
    help="Print policies by which an API server injects by itself (Kubernetes 1.36), instead of a file.",
)
@settings_options
def inject(files: tuple[str, ...], is_policy: bool, **said: Any) -> None:  # Any: as click has read them
    """Put a gate beside the workload in every pod of a file."""
    from proxy.console import stop

    settings = read_settings(said)
    if bool(files) is is_policy:
        stop("name a file with -f, or say --admission-policy", USAGE)
    if is_policy:
        from proxy.injection.admission_policy import objects

        click.echo(dumped(objects(settings)), nl=False)
        return
    documents = [document for file in files for document in _documents(file)]
    click.echo(dumped(_injected(documents, settings)), nl=False)


def _injected(documents: list[Json], settings: Settings) -> list[Json]:
    """Ends the command where a pod is refused."""
    from proxy.console import printable
    from proxy.injection.model import Refused
    from proxy.injection.objects import inject_object, title

    changed, refused = [], False
    for document in documents:
        outcome = inject_object(document, settings)
        if isinstance(outcome, Refused):
            refused = True
            click.echo(f"outgate: {printable(outcome.reason)}", err=True)
            continue
        changed.append(outcome.changed)
        for warning in outcome.warnings:
            click.echo(f"outgate: {printable(title(document))}: {printable(warning)}", err=True)
    if refused:
        raise SystemExit(NO)
    return changed


def _documents(file: str) -> list[Json]:
    """Ends the command where the file cannot be read."""
    import sys

    import yaml

    from proxy.console import stop

    try:
        if file == "-":
            content = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with Path(file).open("rb") as opened:
                content = opened.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            stop(f"{file}: more than {MAX_FILE >> 20} MiB", NOT_STARTED)
        _require_shallow(content)
        found = [one for one in yaml.load_all(content, _loader()) if one is not None]
    except OSError as error:
        stop(f"{file}: {error.strerror or error}", NOT_STARTED)
    except (yaml.YAMLError, ValueError) as error:
        stop(f"{file}: {' '.join(str(error).split())}", NOT_STARTED)
    if not all(isinstance(one, dict) for one in found):
        stop(f"{file}: a document that is no object", NOT_STARTED)
    return found


def _require_shallow(content: bytes) -> None:
    """libyaml's loader has no bound of its own, and ends the process. Raises ValueError, YAMLError."""
    import yaml

    depth = 0
    for event in yaml.parse(content, yaml.CSafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):  # a few of them may stand for gigabytes
            raise ValueError(f"line {line}: an alias; write out what it stands for")
        if depth > MAX_DEPTH:
            raise ValueError(f"line {line}: nested deeper than {MAX_DEPTH}")


def _loader() -> type[Any]:  # Any: PyYAML's loaders have no common type
    """Dates stay the strings that Kubernetes takes them for."""
    import yaml

    class Loader(yaml.CSafeLoader):
        pass

    resolvers = yaml.CSafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in each if tag != "tag:yaml.org,2002:timestamp"]
        for first, each in resolvers.items()
    }
    return Loader


def dumped(documents: list[Json]) -> str:
    """As YAML, in the order in which they were read."""
    import yaml

    class Dumper(yaml.CSafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def show_text(dumper: Any, text: str) -> Any:  # Any: PyYAML's own
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, show_text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, explicit_start=True, allow_unicode=True, width=4096)
