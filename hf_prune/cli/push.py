"""`hf-prune push`: a saved folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.output import Json, show


def push(
    folder: Annotated[Path, typer.Argument(help="What `save_model` or `hf_prune.save_pretrained` wrote.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME, or NAME for the token's own user; made where missing.")],
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made from main where missing.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that was pruned, for the card.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of the data, for the card; repeatable.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language code, for the card; repeatable.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence id, for the card.")] = None,
    as_json: Json = False,
) -> None:
    """Push a saved folder with its card, in one commit; the token is that of `hf auth login` or HF_TOKEN."""
    from hf_prune.checkpoint.hub import MESSAGE, push_folder
    from hf_prune.report.card import About

    about = About(base_model=base_model, datasets=tuple(dataset or ()), language=tuple(language or ()), license=license)
    commit = push_folder(
        folder, repo, revision=revision, private=private or None, commit_message=message or MESSAGE, about=about
    )
    result = {"repo": repo, "commit": commit.oid, "url": commit.commit_url}
    show(result, commit.commit_url, as_json=as_json)
