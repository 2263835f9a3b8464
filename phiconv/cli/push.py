"""`phiconv push`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from phiconv.cli.options import json_option, print_json, quiet_option, verbose_option
from phiconv.errors import noted_when_stopped

if TYPE_CHECKING:
    from phiconv.push import PushPlan


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="ORG/NAME", help="The model repository.")
@click.option("--revision", metavar="BRANCH", help="The branch [default: main].")
@click.option("--create", "make", is_flag=True, help="Make the repository or branch if need be.")
@click.option("--private", is_flag=True, help="Only to a private repository; make it private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option(
    "--delete-others",
    is_flag=True,
    help="Delete the repository's files that are not in DIR, but .gitattributes.",
)
@click.option("--message", metavar="TEXT", help="The commit's message.")
@click.option("--dry-run", is_flag=True, help="Only say what would be uploaded.")
@quiet_option
@json_option
@verbose_option
def push(
    folder: Path,
    repo: str,
    revision: str | None,
    make: bool,
    private: bool,
    create_pr: bool,
    delete_others: bool,
    message: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Upload a release to the Hugging Face Hub.

    DIR is a folder that `phiconv release` made; it is verified first. Its files go to the
    repository in one commit, and what is there afterwards is compared with them. Interrupted, the
    same command goes on where it was. The token is the one of `hf auth login` or HF_TOKEN.
    """
    from phiconv.push import Target, plan_push
    from phiconv.push import push as push_release
    from phiconv.push.verification import require_whole

    target = Target(repo, revision)
    if create_pr and revision is not None:
        raise click.UsageError("--create-pr is for the main branch: leave --revision out")
    require_whole(folder)
    plan = plan_push(folder, target)
    if not as_json and (dry_run or not quiet):
        _print_plan(plan, delete_others)
    if dry_run:
        if as_json:
            print_json(_as_json(plan))
        return
    _show_progress(quiet)
    with noted_when_stopped("the repository has all of it or none; the same command goes on"):
        done = push_release(
            plan,
            make=make,
            private=private,
            pull_request=create_pr,
            delete_others=delete_others,
            message=message,
            note=lambda text: None if quiet else click.echo(text, err=True),
        )
    if as_json:
        print_json({**_as_json(plan), "url": done.url, "commit": done.commit, "new": done.new})
    else:
        state = "pushed" if done.new else "it was all there already"
        click.echo(f"{state}, and the same as {folder}: {done.url}")


def _show_progress(quiet: bool) -> None:
    """Bars on a terminal; elsewhere a line every half minute; or neither."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet:
        disable_progress_bars()
    else:
        logging.getLogger("huggingface_hub").setLevel(logging.INFO)


def _print_plan(plan: PushPlan, delete_others: bool) -> None:
    from phiconv.summary import table
    from phiconv.units import size_text

    where = {
        "there": f"{plan.target} at {(plan.remote.commit or '')[:12]}",
        "no branch": f"{plan.target}, a branch that is not there",
        "no repository": f"{plan.target}, a repository that is not there, or not for this token",
    }[plan.remote.state]
    click.echo(f"{plan.folder} -> {where}")
    rows = [(state, size_text(file.size), file.name) for file, state in plan.files]
    click.echo("\n".join(table(rows)))
    for name in plan.others:
        click.echo(f"  {'would be deleted' if delete_others else 'only there'}: {name}")
    same = len(plan.files) - len(plan.to_upload)
    uploaded = f"{len(plan.to_upload)} files, {size_text(plan.upload_bytes)}, to upload"
    click.echo(f"{uploaded}; {same} are there already")


def _as_json(plan: PushPlan) -> dict[str, object]:
    return {
        "repo": plan.target.repo_id,
        "revision": plan.target.branch,
        "state": plan.remote.state,
        "files": [
            {"name": file.name, "size": file.size, "sha256": file.sha256, "state": state}
            for file, state in plan.files
        ],
        "others": list(plan.others),
        "upload_bytes": plan.upload_bytes,
    }
