"""Finished models of a trainer to the Hub: the repository, the card's facts, the push."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_prune.types import PruneError

if TYPE_CHECKING:
    from hf_prune.report.card import About

FINAL_HUB_STRATEGY = HubStrategy.END


def check_hub_strategy(args: TrainingArguments) -> None:
    """Raise where Trainer would push checkpoints of a run under way."""
    if args.push_to_hub and args.hub_strategy != FINAL_HUB_STRATEGY:
        raise PruneError(
            f"hub_strategy={HubStrategy(args.hub_strategy).value!r} would push checkpoints that only this run "
            f"can read; set hub_strategy={FINAL_HUB_STRATEGY.value!r}."
        )


def push(trainer: Trainer, folder: str, message: str, about: About, blocking: bool = True, **given: Any) -> Any:
    """Push a saved folder; the training arguments say what `given` (token, revision, private) leaves out."""
    from hf_prune.checkpoint.hub import push_folder

    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    if not trainer.is_world_process_zero():
        return None
    usual = {
        "token": trainer.args.hub_token,
        "revision": trainer.args.hub_revision,
        "private": trainer.args.hub_private_repo,
    }
    options = usual | {name: value for name, value in given.items() if value is not None}
    send = partial(push_folder, folder, str(trainer.hub_model_id), commit_message=message, about=about, **options)
    if not blocking:
        return HfApi().run_as_future(send)
    try:
        return send()
    except PruneError as error:
        again = f"`hf-prune push {folder} {trainer.hub_model_id}`"
        raise PruneError(f"{error} The model is safe in {folder!r}; {again} pushes it.") from error


def card_facts(
    trainer: Trainer,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: Any = None,
    dataset_tags: str | list[str] | None = None,
    dataset: Any = None,
    dataset_args: Any = None,
) -> About:
    """What the card says beside the report, under the names that `Trainer.create_model_card` has for it."""
    from hf_prune.report.card import About

    return About(
        name=model_name, base_model=finetuned_from, datasets=_listed(dataset_tags), license=license,
        language=_listed(language), tags=(*_listed(tags), *(getattr(trainer.model, "model_tags", None) or ())),
    )  # fmt: skip


def _listed(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
