"""`outgate tags import`: a cloud's published service tags as a file for `--tags`, and what is new in it."""

from __future__ import annotations

from pathlib import Path

import click

from policies.tags import Cloud, MalformedTags, TagChange, Tags, compare_tags, read_tags, write_tags
from proxy.commands import NO, NOT_STARTED

SHOWN = 8  # prefixes of one tag

EPILOG = """\b
Where the clouds publish them:
  azure  download.microsoft.com, "Azure IP Ranges and Service Tags - Public Cloud"
  aws    ip-ranges.amazonaws.com/ip-ranges.json
  gcp    www.gstatic.com/ipranges/cloud.json (goog.json: all that is Google's)

\b
Example:
  outgate tags import aws ip-ranges.json -o aws.tags.json
  outgate check -p policy.yaml --tags aws.tags.json

\b
Exit codes: 0 yes; 1 no (with --check: OUTPUT is not what FILE says); 2 usage; 3 a file cannot be read or written.
"""


@click.group()
def tags() -> None:
    """Keep the service tags that rules name: `tcp: {tag: AWS.S3.eu-west-1, ports: [443]}`."""


@tags.command("import", epilog=EPILOG)
@click.argument("cloud", type=click.Choice([cloud.value for cloud in Cloud]))
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the tags are written; CLOUD.tags.json if not given.",
)
@click.option("--check", "only_checks", is_flag=True, help="Write nothing; say whether anything would change.")
def import_tags(cloud: str, path: Path, output: Path | None, *, only_checks: bool) -> None:
    """Write the tags of FILE, as the cloud publishes it, and print which prefixes come and go."""
    from pki.files import PUBLIC, write_file
    from proxy.console import printable, stop

    output = output or Path(f"{cloud}.tags.json")
    after = _read(Cloud(cloud), path)
    before = _read(Cloud.AZURE, output) if output.exists() else {}
    changes = list(compare_tags(before, after))
    for change in changes if before else ():
        click.echo(printable(_shown(change)))
    says = f"{output}: {len(after)} tags, {sum(map(len, after.values()))} prefixes"
    if not changes:
        click.echo(f"{says}, as before")
        return
    says += f"; {len(changes)} tags have changed" if before else ""
    if only_checks:
        stop(f"{says}; import without --check to write them", NO)
    try:
        write_file(output.resolve(), write_tags(after), PUBLIC)
    except OSError as error:
        stop(f"{output}: {error.strerror or error}", NOT_STARTED)
    click.echo(says)


def _read(cloud: Cloud, path: Path) -> Tags:
    from policies.tree import MAX_BYTES
    from proxy.console import stop

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise MalformedTags(f"larger than {MAX_BYTES >> 20} MiB; is it the right file?")
        return read_tags(cloud, content)
    except OSError as error:
        stop(f"{path}: {error.strerror or error}", NOT_STARTED)
    except MalformedTags as error:
        stop(f"{path}: {error}", NOT_STARTED)


def _shown(change: TagChange) -> str:
    words = [f"+{one}" for one in change.added] + [f"-{one}" for one in change.removed]
    more = [f"… and {len(words) - SHOWN} more"] if len(words) > SHOWN else []
    return " ".join([f"{change.name}:", *words[:SHOWN], *more])
