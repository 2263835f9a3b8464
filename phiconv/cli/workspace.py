"""`phiconv cache`."""

from __future__ import annotations

import click

from phiconv.cli.options import verbose_option


@click.group()
def cache() -> None:
    """Look at the workspace, or make it smaller."""


@cache.command("ls")
@verbose_option
def cache_ls() -> None:
    """List the artifacts, most recently used first."""
    import time

    from phiconv.summary import entries_text
    from phiconv.workspace import Workspace

    workspace = Workspace.default()
    click.echo(f"workspace {workspace.home}")
    click.echo(entries_text(workspace.entries(), time.time()))


@cache.command("gc")
@click.option("--older-than", metavar="AGE", help="Remove what was not used for AGE, such as 30d.")
@click.option(
    "--max-size", metavar="SIZE", help="Remove the least recently used above SIZE, such as 20GB."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@verbose_option
def cache_gc(older_than: str | None, max_size: str | None, dry_run: bool) -> None:
    """Remove artifacts that are old or too many.

    What killed builds left is always removed, but what they could go on from stays with
    --older-than until it is that old. What a running build may be using is kept. Output folders
    are yours: what lies there is never removed, and counts as no space here.
    """
    import time

    from phiconv.summary import entries_text
    from phiconv.units import size_text
    from phiconv.workspace import Workspace
    from phiconv.workspace.collect import collect, parse_duration, parse_size
    from phiconv.workspace.session import open_session

    age = parse_duration(older_than) if older_than else None
    size = parse_size(max_size) if max_size else None
    with open_session(Workspace.default()) as session:
        done = collect(session, older_than=age, max_bytes=size, dry_run=dry_run)
    if done.entries:
        click.echo(entries_text(done.entries, time.time()))
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(done.entries)} artifacts {verb}, {size_text(done.freed_bytes)}")
    if done.broken:
        click.echo(f"{len(done.broken)} broken ones {verb}")
    if done.unfinished:
        click.echo(f"unfinished work of {len(done.unfinished)} killed steps {verb}")
    if done.in_use:
        click.echo(f"{done.in_use} kept, because a running build may use them")
    click.echo(f"{size_text(done.kept_bytes)} kept")
