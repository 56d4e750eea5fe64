"""`llmctl push` and `llmctl pull`: models to the hub and from it."""

from __future__ import annotations

from typing import Annotated

import typer

from llmctl.cli.options import AsJson, DryRun
from llmctl.cli.output import print_json, print_table, size
from llmctl.cli.progress import make_talk
from llmctl.cli.run_page import visible


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", hidden=True)],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", hidden=True)],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="the repository may exist; put files over it")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base", metavar="USER/NAME", help="where an adapter's base is on the hub")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Publish the result of RUN on the hub as USER/NAME.

    Its result files and a model card made from its manifest; no checkpoints, optimizer state, metrics or other
    files of the run. --dry-run lists the files and prints the card. A run that is not done, was refused or was
    changed since is not pushed. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from llmctl.stages import push as stage

    told = stage.run(run, name, make_talk(), private=private, update=update, base=base, dry_run=dry_run)
    if as_json:
        print_json(told)
        return
    if dry_run:
        print(told["card"])
    _print_files(told["files"])
    print(f"\n{'would push to' if dry_run else 'pushed to'} {told['url']}{' (private)' if private else ''}")


def pull(
    name: Annotated[str, typer.Argument(metavar="USER/NAME", hidden=True)],
    folder: Annotated[str | None, typer.Argument(metavar="[DIR]", hidden=True)] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="download weights in pickles too, which can run code")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Download the model USER/NAME from the hub into DIR.

    Config, safetensors, tokenizer and card, nothing else; DIR is `models/NAME` when it is left out. Pull again to
    get what changed.
    """
    from llmctl.stages import pull as stage

    told = stage.run(name, folder, make_talk(), allow_pickle=allow_pickle, dry_run=dry_run)
    if as_json:
        print_json(told)
        return
    _print_files(told["files"])
    print(f"\n{'would pull into' if dry_run else 'pulled into'} {told['path']}")


def _print_files(files: list[dict[str, object]]) -> None:
    rows = [(visible(str(one["name"])), size(int(str(one["bytes"])))) for one in files]
    print_table(("file", "size"), [*rows, ("total", size(sum(int(str(one["bytes"])) for one in files)))])
