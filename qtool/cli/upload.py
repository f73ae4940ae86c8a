"""`qtool upload`: a model to a hub, with a model card."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from qtool import sizes
from qtool.cli.options import Debug, Json, Quiet, console, path_or_stdin
from qtool.errors import InputError
from qtool.files import expand


def upload(
    folder: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, or - to read its path from standard input.")
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository. It is made if it doesn't exist.")],
    to: Annotated[
        Literal["huggingface", "modelers"], typer.Option("--to", help="The hub to upload to.")
    ] = "huggingface",
    private: Annotated[
        bool, typer.Option("--private", help="If the repository has to be made, make it private.")
    ] = False,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="A file that holds the access token.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME", help="The original model, for the card. qtool knows it where it downloaded it."
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The license, for the card, such as apache-2.0.", show_default="the original's"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a model to a hub and print the repository's address.

    A model that qtool quantized gets a model card, written from its qtool.json and shown before anything is sent.
    After an interruption, run the same command again: files that the repository has already are not sent again.

    Examples:

      qtool upload ./SmolLM2-135M-w8a8 me/SmolLM2-135M-w8a8 --private

      qtool quantize ./SmolLM2-135M | qtool upload - me/SmolLM2-135M-w8a8 --to modelers --token-file ~/.modelers-token
    """
    from qtool.hub import tokens
    from qtool.hub.card import front_matter
    from qtool.hub.upload import Given, pack
    from qtool.jobs import upload as jobs

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise InputError("not a repository's name", where=repo[:100], hint="It is given as ORG/NAME.")
    path = expand(path_or_stdin(folder)).absolute()
    target = jobs.Target(repo, to, tokens.read(to, token_file), private)
    parcel = pack(path, repo, Given(base_model, license))
    with console() as out:
        out.info(f"{path} to {target.shown}: {len(parcel.names)} files, {sizes.show(parcel.nbytes)}")
        if parcel.card:
            out.info(f"\n{parcel.card}")
            for key, option in (("base_model", "--base-model ORG/NAME"), ("license", "--license NAME")):
                if key not in front_matter(parcel.card):
                    out.warning(f"the card names no {key}: hubs show it on the model's page. Give {option}")
        if dry_run:
            plan = {"repo": repo, "hub": to, "files": parcel.names, "bytes": parcel.nbytes, "card": parcel.card}
            out.result(plan if json else "\n".join(parcel.names))
            return
        if sys.stdin.isatty() and not yes and not typer.confirm("Send this?", err=True):
            out.info("nothing was sent")
            raise typer.Exit(1)
        sent = jobs.send(parcel, target, out.event)
        out.info(f"{len(sent['sent'])} files sent, {len(sent['skipped'])} were there already")
        out.result(sent if json else sent["url"])
