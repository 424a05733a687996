"""Push a pruned model to the Hugging Face Hub: one folder, one commit, and one sentence where that cannot be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as ConnectionBroke  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from hf_prune import __version__
from hf_prune.checkpoint.files import check_files
from hf_prune.checkpoint.format import CheckpointTable, parse
from hf_prune.checkpoint.save import Saves, is_ours, save_pretrained
from hf_prune.types import CheckpointError, PruneError, Report

if TYPE_CHECKING:
    from hf_prune.report.card import About

MESSAGE = "Push a pruned model"

_LEFT_OUT = (".*", "_*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "trainer_state.json")
"""Files that are not pushed: hidden ones, logs, and pickles, which can hold anything (a Trainer's `training_args.bin`
holds its token). Of subfolders only `_SUBFOLDER` is pushed: the others are a run's checkpoints, logs and copies."""

_SUBFOLDER = "additional_chat_templates"

_PLOTS = "plots"


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    report: Report,
    processing_class: Saves | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = MESSAGE,
    encode: str = "auto",
    standalone: bool = False,
    token: str | None = None,
    about: About | None = None,
) -> CommitInfo:
    """Save `model` as `hf_prune.save_pretrained` does and push that, with its card, in one commit.

    repo_id: "user/name", or "name" for the token's own user. Made where it does not exist, `private` or not.
    revision: branch to commit to, made from main where it does not exist.
    encode, standalone, processing_class: as for `save_pretrained`.
    token: of the Hub; the one that `hf auth login` or HF_TOKEN gave where omitted.
    about: what the card says beside the report.

    Raises:
        PruneError: it could not be pushed; the branch is as it was.
    """
    _require_connection(repo_id, token)
    with tempfile.TemporaryDirectory() as work:
        save_pretrained(model, work, report, encode=encode, standalone=standalone, processing_class=processing_class)
        return push_folder(
            work, repo_id, private=private, revision=revision, commit_message=commit_message, token=token, about=about
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = MESSAGE,
    token: str | None = None,
    about: About | None = None,
) -> CommitInfo:
    """Push a folder that `save_pretrained` wrote with its report, in one commit; arguments as for `push_to_hub`.

    Files of an earlier push that this one lacks go in the same commit. The card is generated, unless the folder has a
    README.md without the line that marks a generated one.

    Raises:
        PruneError: the folder is damaged or could not be pushed; the branch is as it was.
    """
    from hf_prune.report.card import make_card

    _require_connection(repo_id, token)
    files = _files_to_push(Path(folder))
    make_card(folder, about)  # what is wrong with the report is said before anything is made on the Hub
    api = _api(token)
    with _explained(repo_id):
        repo_id = create_repo(repo_id, private=private, token=token)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        last = api.model_info(repo_id, revision=revision)
        content = files | _generated(Path(folder), repo_id, about)
        stale = {each.rfilename for each in last.siblings or ()} - content.keys()
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, source) for name, source in content.items()]
            + [CommitOperationDelete(name) for name in sorted(stale) if is_ours(name) or name.startswith(f"{_PLOTS}/")],
            commit_message=commit_message,
            revision=revision,
            parent_commit=last.sha,
        )


def create_repo(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make the model repository where it does not exist; returns its full id, "user/name".

    Raises:
        PruneError: the Hub cannot be reached, or refuses.
    """
    _require_connection(repo_id, token)
    with _explained(repo_id):
        return _api(token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_prune", library_version=__version__)


def _files_to_push(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file. Raises `CheckpointError` where config and weights do not belong together."""
    paths = [path for where in (folder, folder / _SUBFOLDER) for path in sorted(where.glob("*")) if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if not any(fnmatch(path.name, pattern) for pattern in _LEFT_OUT)
    }
    weights = [path for name, path in files.items() if name.endswith(".safetensors")]
    if "config.json" not in files or not weights:
        raise PruneError(
            f"{str(folder)!r} must hold config.json and .safetensors files, got {sorted(files) or 'none'}; "
            "write it with hf_prune.save_pretrained(model, folder, report=report)."
        )
    _check_whole(files, weights)
    return files


def _check_whole(files: Mapping[str, Path], weights: Iterable[Path]) -> None:
    from hf_prune.report.reading import read_json

    config = read_json(files["config.json"])
    table = config.get("quantization_config") if isinstance(config, dict) else config
    if not isinstance(table, (dict, type(None))):
        raise CheckpointError(f"{files['config.json']} is no model's config; save the model again.")
    check_files(parse(table) if table else CheckpointTable(), {}, weights)
    for index in (path for name, path in files.items() if name.endswith(".safetensors.index.json")):
        missing = set(read_json(index)["weight_map"].values()) - files.keys()
        if missing:
            raise CheckpointError(f"{index} names {', '.join(sorted(missing))}, which the folder lacks.")


def _generated(folder: Path, repo_id: str, about: About | None) -> dict[str, bytes]:
    """Path in the repository -> content of what is made for the push: plots, and the card that shows them."""
    from hf_prune.report.card import CARD_FILE, GENERATED, About, make_card

    plots = _plots(folder) if find_spec("matplotlib") else {}
    own = folder / CARD_FILE
    if own.is_file() and GENERATED not in own.read_text(encoding="utf-8"):
        return plots
    about = replace(about or About(), name=repo_id, plots=tuple(plots))
    return plots | {CARD_FILE: str(make_card(folder, about)).encode()}


def _plots(folder: Path) -> dict[str, bytes]:
    from hf_prune.report.plots import draw
    from hf_prune.report.reading import read_history, read_report

    with tempfile.TemporaryDirectory() as work:
        drawn = draw(read_report(folder), work, read_history(folder))
        return {f"{_PLOTS}/{path.name}": path.read_bytes() for path in drawn}


def _require_connection(repo_id: str, token: str | None) -> None:
    """Raise at once, before anything is saved, where nothing could be pushed."""
    if huggingface_hub.is_offline_mode():
        raise PruneError(
            f"{repo_id!r} cannot be pushed while HF_HUB_OFFLINE is set: unset it, or save the model with "
            "hf_prune.save_pretrained and run `hf-prune push FOLDER REPO` where there is a connection."
        )
    if token is None and huggingface_hub.get_token() is None:
        raise PruneError(
            f"{repo_id!r} cannot be pushed without a Hugging Face token: run `hf auth login`, set HF_TOKEN, "
            "or pass token=."
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence that says what to do."""
    try:
        yield
    except PruneError:
        raise
    except (ConnectionBroke, OSError, RuntimeError, ValueError) as error:
        raise PruneError(f"{_reason(error, repo_id)} A push is one commit: all of it is there, or nothing.") from error


_ADVICE = {
    401: "the token is not valid; run `hf auth login` again, or pass another token=.",
    403: "the token may not write there; use one with write access, or your own user name before the slash.",
    404: "there is no such repository or branch, or the token may not see it; check its name and revision=.",
    409: "someone else changed it meanwhile; push again.",
    412: "someone else changed it meanwhile; push again.",
}


def _reason(error: BaseException, repo_id: str) -> str:
    # An upload that failed is wrapped by the client; what happened is its cause.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(cause, HfHubHTTPError):
        status, said = cause.response.status_code, cause.server_message
        advice = _ADVICE.get(status, "push again later." if status >= 500 else "check the settings of the repository.")
        return f"The Hub answered {status} to pushing {repo_id!r}{f' ({said})' if said else ''}: {advice}"
    text = " ".join(str(cause).split())
    if isinstance(cause, ConnectionBroke):
        return f"The connection to {_api(None).endpoint} broke while pushing {repo_id!r} ({text}); push again."
    return f"{repo_id!r} cannot be pushed: {text}"
