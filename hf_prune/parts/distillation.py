"""Losses that pull the student towards one or several teachers: logits, hidden states, attention maps.

Teachers run once per batch, in eval mode, without gradient, and are held outside the student's module tree: they are
never saved, wrapped or counted with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.config import require_range
from hf_prune.types import PruneError

Teacher = nn.Module | str | Path
"""A model, a folder, a Hub id, or "self"."""

LOGITS = ("logits", "start_logits", "end_logits")
_LEAST = torch.finfo(torch.float32).min / 2  # the difference of two is finite


@dataclass(frozen=True)
class DistillConfig:
    """Weights of the distillation terms; `loss = (1 - alpha) * task + alpha * KL + hidden + attention`."""

    temperature: float = 2.0  # of both softmaxes; the KL term is multiplied by its square
    alpha: float = 0.5  # share of the KL term against the task loss, in [0, 1]
    hidden_weight: float = 0.0  # weight of the mean squared error between hidden states
    attention_weight: float = 0.0  # weight of the KL divergence between attention maps
    layer_map: tuple[tuple[int, int], ...] = ()  # (student layer, teacher layer) pairs; empty: spread evenly

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}.")
        require_range("alpha", self.alpha, 0.0, 1.0)
        for name in ("hidden_weight", "attention_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")
        object.__setattr__(self, "layer_map", tuple((int(s), int(t)) for s, t in self.layer_map))

    @property
    def student_flags(self) -> dict[str, bool]:
        """Extra model inputs that make the student return what the terms compare."""
        flags = {"output_hidden_states": self.hidden_weight > 0, "output_attentions": self.attention_weight > 0}
        return {name: True for name, wanted in flags.items() if wanted}


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """`T^2 * KL(teacher || student)` of softened class probabilities, mean over rows (Hinton et al. 2015, section 2).

    student, teacher: (..., classes) logits.  valid: bool of the leading shape, rows that count.
    """
    # Finite where a class is masked with -inf: 0 * log 0 counts 0.
    log_student, log_teacher = (
        F.log_softmax(logits.float() / temperature, dim=-1).clamp(min=_LEAST) for logits in (student, teacher)
    )
    return temperature**2 * _mean((log_teacher.exp() * (log_teacher - log_student)).sum(-1), valid)


def logits_divergence(
    outputs: Mapping[str, Any], taught: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any], temperature: float
) -> Tensor:
    """`kl_divergence` of a student's logits from those of its teachers, averaged as probabilities.

    outputs, taught: `ModelOutput`s for the same `inputs`; positions without a label do not count.
    """
    names = [name for name in LOGITS if name in outputs]
    if not names:
        raise PruneError(f"distillation needs one of {LOGITS} in the model's output, got {list(outputs)}.")
    valid, terms = _valid_rows(outputs, inputs), []
    for name in names:
        student, teachers = outputs[name], [answer[name] for answer in taught]
        if student.shape != teachers[0].shape:
            raise PruneError(
                f"student and teacher disagree on {name}: {tuple(student.shape)} against "
                f"{tuple(teachers[0].shape)}; use a teacher with the same labels and tokenizer."
            )
        mean = _mean_teacher([_classes_last(each) for each in teachers], temperature)
        rows = valid if student.ndim == 3 else None
        terms.append(kl_divergence(_classes_last(student), mean, temperature, rows))
    return torch.stack(terms).mean()


def _classes_last(logits: Tensor) -> Tensor:
    """Logits as they are, or those of a segmentation, `(batch, classes, height, width)`, with the classes at the end."""
    return logits.movedim(1, -1) if logits.ndim == 4 else logits


class Distiller:
    """The distillation loss of one student against its teachers.

    Args:
        teachers: models that take the student's inputs; several are averaged as probabilities.
        config: weights of the terms.
        student: only read, for its number of layers and hidden width.
    """

    def __init__(self, teachers: Sequence[nn.Module], config: DistillConfig, student: nn.Module) -> None:
        self.teachers = tuple(teachers)
        self.config = config
        if (config.hidden_weight or config.attention_weight) and len(self.teachers) > 1:
            raise PruneError("hidden_weight and attention_weight compare layers of one teacher, got several teachers.")
        self._check_widths(student)

    def _check_widths(self, student: nn.Module) -> None:
        for teacher in self.teachers:
            ours, theirs = (getattr(m.config, "hidden_size", None) for m in (student, teacher))
            if self.config.hidden_weight and ours != theirs:
                raise PruneError(
                    f"hidden_weight compares hidden states of equal width, got {ours} (student) and {theirs} "
                    "(teacher); set hidden_weight=0 or choose a teacher of the student's width."
                )

    def terms(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted terms of one batch by name; the task loss beside them counts `1 - alpha`.

        outputs: the student's `ModelOutput` for `inputs`, with what `DistillConfig.student_flags` asks for.
        """
        config, taught = self.config, self._ask_teachers(inputs)
        terms = {"distill_logits": config.alpha * logits_divergence(outputs, taught, inputs, config.temperature)}
        if config.hidden_weight:
            terms["distill_hidden"] = config.hidden_weight * self._hidden_term(outputs, taught[0], inputs)
        if config.attention_weight:
            terms["distill_attention"] = config.attention_weight * self._attention_term(outputs, taught[0], inputs)
        return terms

    @torch.no_grad()
    def _ask_teachers(self, inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
        asked = {
            k: v
            for k, v in inputs.items()
            if k not in ("labels", "start_positions", "end_positions", "num_items_in_batch")
        }
        answers = []
        for teacher in self.teachers:
            teacher.to(device).eval()
            answers.append(teacher(**{**asked, **self.config.student_flags, "return_dict": True}))
        return answers

    def _hidden_term(self, outputs: Mapping[str, Any], taught: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        ours, theirs = _states(outputs, "hidden_states"), _states(taught, "hidden_states")
        valid = _token_mask(inputs, ours[0])
        pairs = _layer_pairs(len(ours), len(theirs), self.config.layer_map, first=1)
        return torch.stack(
            [_mean((ours[s].float() - theirs[t].float()).square().mean(-1), valid) for s, t in pairs]
        ).mean()

    def _attention_term(
        self, outputs: Mapping[str, Any], taught: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> Tensor:
        ours, theirs = _states(outputs, "attentions"), _states(taught, "attentions")
        pairs = _layer_pairs(len(ours), len(theirs), self.config.layer_map, first=0)
        terms = []
        for s, t in pairs:
            # Heads need not correspond, nor be equally many: the mean over heads is compared, (batch, queries, keys).
            p, q = theirs[t].float().mean(1), ours[s].float().mean(1)
            divergence = (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(-1)
            terms.append(_mean(divergence, _token_mask(inputs, divergence)))
        return torch.stack(terms).mean()


def _mean_teacher(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits whose softmax at `temperature` is the mean of the teachers' softened probabilities."""
    if len(logits) == 1:
        return logits[0]
    probabilities = torch.stack([F.softmax(each.float() / temperature, dim=-1) for each in logits]).mean(0)
    return probabilities.log() * temperature


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean()
    weights = valid.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def _valid_rows(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor | None:
    """Positions with a label, for outputs of one row per token or pixel."""
    logits, labels = outputs.get("logits"), inputs.get("labels")
    if logits is None or labels is None or logits.ndim < 3 or labels.shape != logits.shape[:-1]:
        return None
    return labels != -100


def _token_mask(inputs: Mapping[str, Any], like: Tensor) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.shape == like.shape[:2] else None


def _states(outputs: Mapping[str, Any], name: str) -> Sequence[Tensor]:
    states = outputs.get(name)
    if not states:
        raise PruneError(
            f"the model returned no {name}, which distillation compares; call it with output_{name}=True"
            + (" and load it with attn_implementation='eager'." if name == "attentions" else ".")
        )
    return states


def _layer_pairs(ours: int, theirs: int, given: Sequence[tuple[int, int]], first: int) -> list[tuple[int, int]]:
    """Which states to compare. `first` is 1 where index 0 is the embedding output, which layers do not count."""
    layers, teacher_layers = ours - first, theirs - first
    pairs = given or [(i, (i + 1) * teacher_layers // layers - 1) for i in range(layers)]
    for s, t in pairs:
        if not (0 <= s < layers and 0 <= t < teacher_layers):
            raise PruneError(
                f"layer_map pair {(s, t)} is outside {layers} student and {teacher_layers} teacher layers."
            )
    return [(s + first, t + first) for s, t in pairs]


def load_teacher(teacher: nn.Module | str | Path, student: nn.Module, tokenizer: Any = None) -> nn.Module:
    """A model, a folder, a Hub id, or "self" (a copy of the student as it is now) -> a teacher that fits the student.

    Raises:
        PruneError: other labels, another vocabulary, or nothing loadable under that name.
    """
    if isinstance(teacher, nn.Module):
        model = teacher
    elif str(teacher) == "self":
        model = copy.deepcopy(student)
    else:
        from hf_prune.checkpoint.load import load_pretrained

        model = load_pretrained(str(teacher), role="teacher")
    if model is student:
        raise PruneError("the teacher is the student itself; pass teacher='self' for a copy of it before pruning.")
    _check_labels(model, student)
    _check_vocabulary(model, student, None if isinstance(teacher, nn.Module) else str(teacher), tokenizer)
    return model


def _check_labels(teacher: nn.Module, student: nn.Module) -> None:
    ours, theirs = getattr(student.config, "id2label", None), getattr(teacher.config, "id2label", None)
    if ours is None or theirs is None or ours == theirs:
        return
    named = [labels for labels in (ours, theirs) if labels != {i: f"LABEL_{i}" for i in range(len(labels))}]
    if len(ours) != len(theirs) or len(named) == 2:
        raise PruneError(
            f"teacher and student have other labels: {_short(theirs)} against {_short(ours)}; "
            "give both models the same num_labels, id2label and order."
        )


def _short(labels: Mapping[int, str]) -> str:
    shown = ", ".join(f"{i}: {name}" for i, name in list(labels.items())[:4])
    return f"{len(labels)} ({shown}{', ...' if len(labels) > 4 else ''})"


def _check_vocabulary(teacher: nn.Module, student: nn.Module, path: str | None, tokenizer: Any) -> None:
    ours, theirs = (getattr(m.config, "vocab_size", None) for m in (student, teacher))
    if ours != theirs and None not in (ours, theirs):
        raise PruneError(
            f"teacher and student read other tokens: vocabularies of {theirs} and {ours}; "
            "distillation feeds both the same ids, so they must share a tokenizer."
        )
    if path is None or tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return  # a checkpoint saved without its tokenizer: sizes were compared above
    if other.get_vocab() != tokenizer.get_vocab():
        raise PruneError(f"the tokenizer of teacher {path!r} maps words to other ids than the student's tokenizer.")
