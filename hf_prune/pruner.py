"""`Pruner` holds one recipe on one model, from attach to finalize. It has no branch per method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune import methods
from hf_prune.baking import bake, prices, refuse_unshrinkable, units_to_cut
from hf_prune.config import PruneConfig
from hf_prune.graph.lazy import ExampleInputs, LazyGraph
from hf_prune.graph.trace import evaluating
from hf_prune.narrowing import Narrowing, narrowing_of
from hf_prune.optimizer import PruneOptimizer, StepRules, move_to_group, remove_from_groups
from hf_prune.parts.budgets import CORRECTIONS
from hf_prune.parts.distillation import DistillConfig, Distiller, Teacher, load_teacher
from hf_prune.parts.gates import copy_with_gates, refuse_parametrized, restored_on_error
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.rounds import Build, Round
from hf_prune.parts.statistics import Calibration, Data
from hf_prune.report import sparsity
from hf_prune.types import Phase, Plan, PruneError, Report

_ROUNDING = 1e-9  # of progress: 3 of 10 steps are at 0.3


class Pruner:
    """One pruning run.

    Args:
        model: changed in place by `attach` and `finalize`.
        config: the method and its settings.
        example_inputs: inputs by name for one forward pass, or a function that gives them, needed by methods that look
            at the model's graph; the model's own `dummy_inputs` where omitted.
        data: batches as the model takes them, with labels (a list, a DataLoader, or a function that opens one), needed
            by methods that measure their scores.
        evaluate: model -> its metrics on validation data, the same on every process, needed by methods that guard one.
        teacher: a model, a folder, a Hub id, or "self", or several of them, whose probabilities are averaged; None for
            no distillation.
        distillation: weights of the distillation terms.
        tokenizer: compared with the teacher's where both are known.
        build: in place of the method's own, for one of its rounds.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        example_inputs: ExampleInputs = None,
        *,
        data: Data | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        teacher: Teacher | Sequence[Teacher] | None = None,
        distillation: DistillConfig | None = None,
        tokenizer: Any = None,
        build: Build | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.method = methods.load(config.method)
        _check_goal(config, self.method)
        self._teachers = _listed(teacher)
        if distillation is not None and not self._teachers:
            raise PruneError("distillation needs a teacher: a model, a folder, a Hub id or 'self'.")
        self.distillation = distillation or (DistillConfig() if self._teachers else None)
        self._tokenizer, self._build = tokenizer, build or self.method.build
        self.graph = LazyGraph(model, example_inputs)
        self.calibration = Calibration(model, data)
        self._evaluate = evaluate
        self._optimizer: PruneOptimizer | None = None
        self._snapshot: dict[str, Any] | None = None
        self.recipe: Recipe | None = None
        self.distiller: Distiller | None = None
        self.report: Report | None = None
        self.phase = Phase("train")
        self._step = -1
        self._progress = 0.0
        self._share = 0.0
        self._fixed = False
        self._narrowing: Narrowing | None = None
        self._cuts = 0
        self._last_terms: dict[str, Tensor] = {}

    @property
    def attached(self) -> bool:
        """Whether the gates are in the model: between `attach` and `finalize`."""
        return self.recipe is not None

    @property
    def has_passes(self) -> bool:
        """Whether the method runs the model itself, several times a batch: `batch_loss` instead of model and `loss`."""
        return self._attached.passes is not None

    @property
    def rounds(self) -> Sequence[Round]:
        """The runs that the method is made of, where it is made of several."""
        return self._attached.rounds

    def as_own(self, report: Report) -> Report:
        """`report` of a run that this one's method has made, under this one's method, config and paper."""
        config, paper = self.config.to_dict(), asdict(self.method.PAPER)
        return replace(report, method=self.config.method, config=config, paper=paper)

    def attach(self) -> None:
        """Build the recipe and insert its gates. Call before the model is wrapped (DDP, compile) or resumed.

        Raises:
            PruneError: the model cannot be pruned this way; it is left as it was.
        """
        if self.attached or self.report is not None:
            raise PruneError("this Pruner was attached before; make a new one for another run.")
        if self.distillation is not None:
            teachers = [load_teacher(each, self.model, self._tokenizer) for each in self._teachers]
            self.distiller = Distiller(teachers, self.distillation, self.model)
        recipe = self._build(self.model, self.graph, self.config)
        if recipe.measured_scores is not None and recipe.needs_data and not self.calibration.given:
            raise PruneError(
                f"method {self.config.method!r} with these settings measures its scores on data: give "
                "hf_prune.prune(...) or Pruner(...) data=, batches as the model takes them."
            )
        if recipe.review is not None and self._evaluate is None:
            raise PruneError(
                f"method {self.config.method!r} looks at a metric while it prunes: give PruneTrainer one eval_dataset, "
                "or Pruner(...) evaluate=, a function of the model that returns its metrics on validation data."
            )
        refuse_parametrized(self.model, [tensor for each in recipe.structures for tensor in each.tensors])
        refuse_unshrinkable(self.model, self.graph, recipe.structures)
        names = dict(self.model.named_parameters(remove_duplicate=False))  # a tied weight has several
        with restored_on_error(self.model):
            for gate in recipe.gates:
                gate.insert(self.model)
            self._narrowing = narrowing_of(self.model, self.graph, recipe)
        self._frozen = [names[name] for name in recipe.frozen if name in names and names[name].requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self.recipe = recipe

    def wrap(self, optimizer: torch.optim.Optimizer) -> PruneOptimizer:
        """An optimizer that also trains scores and gates and applies the recipe around each step."""
        recipe, extras = self._attached, []
        for kind, parameters in self._gate_parameters().items():
            option = recipe.optimizers.get(kind)
            if option is None:
                raise PruneError(f"method {self.config.method!r} says nothing about the optimizer of its {kind}.")
            if callable(option):
                remove_from_groups(optimizer, parameters)
                extras.append(option(parameters))
            else:
                move_to_group(optimizer, parameters, **option)
        controlled = recipe.controller is not None
        rules = StepRules(
            transforms=recipe.transforms,
            projections=recipe.projections,
            trainable=self._trains if controlled else None,
            lr_scale=(lambda: self.phase.lr_scale) if controlled else None,
        )
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._optimizer = PruneOptimizer(optimizer, rules, extras, saved={"pruner": self})
        return self._optimizer

    def _gate_parameters(self) -> dict[str, list[nn.Parameter]]:
        kinds: dict[str, list[nn.Parameter]] = {}
        for gate in self._attached.gates:
            for kind, parameter in gate.parameters():
                kinds.setdefault(kind, []).append(parameter)
        return kinds

    def _trains(self, parameter: nn.Parameter) -> bool:
        name = self._names.get(parameter)  # None: a parameter of the user's loss, say
        return name is None or self.phase.trainable is None or self.phase.trainable(name)

    def check_schedule(self, total_steps: int) -> None:
        """Raise unless a run of `total_steps` optimizer steps reaches the goal by steps in between."""
        begin, end = self.config.begin, self.config.end
        if (end - begin) * total_steps < 1:
            raise PruneError(
                f"the pruning schedule runs from begin={begin} to end={end} of {total_steps} optimizer steps, which is "
                "less than one step: the model would stay dense. Train longer, or widen begin and end."
            )

    def step(self, step: int, total_steps: int) -> None:
        """Move to the state after `step` of `total_steps` optimizer steps: masks, phase, controller.

        Call with 0 before the first step and after each optimizer step; repeating a step changes nothing.
        """
        recipe = self._attached
        if step == self._step:
            return
        if total_steps < 1:
            raise PruneError(f"total_steps must be at least 1, got {total_steps}; progress is step / total_steps.")
        self._fixed = self._fixed and step > self._step  # a run that starts again selects again
        self._cuts = self._cuts if step > self._step else 0
        self._step, self._progress = step, step / total_steps
        if recipe.selection is not None and not self._fixed:
            share = recipe.schedule(self._progress) if recipe.schedule else self._progress
            self._select(share)
            measured = self.config.goal is not None and self.config.goal.name in CORRECTIONS
            ended = recipe.fixed_from is not None and self._progress >= recipe.fixed_from
            self._fixed = ended or (measured and share >= 1.0)  # what was measured is what must stay
        if recipe.controller is not None:
            own = {"step": step, "total_steps": total_steps, "progress": self._progress, "sparsity": self.sparsity}
            self.observe(own)
        if recipe.review is not None:
            recipe.review(self)
            if recipe.controller is not None:
                self.phase = recipe.controller.phase(step)
        due = sum(self._progress >= point - _ROUNDING for point in recipe.shrink_at)
        if due > self._cuts:
            self._cuts = due
            self.shrink_now()

    def _select(self, share: float) -> None:
        """Set the plan at `share` of the way to the goal, from scores as they are now."""
        recipe, before = self._attached, self._share
        assert recipe.selection is not None
        self._share = share
        if recipe.measured_scores is None:
            scores = recipe.scores() if recipe.scores else {}
        elif share == 0.0:
            return self._set_plan({each.name: torch.ones(each.units, dtype=torch.bool) for each in recipe.structures})
        elif share == before:
            return None
        else:
            with evaluating(self.model):
                scores = recipe.measured_scores(self.calibration)
        return self._set_plan(recipe.selection(self._lowest_where_gone(scores), share))

    def _lowest_where_gone(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Scores so low for units that are gone for good that they are never taken before others."""
        gone = {name: ~keep for name, keep in self._alive.items()}
        return {n: score.masked_fill(gone[n], -torch.inf) if n in gone else score for n, score in scores.items()}

    @property
    def _alive(self) -> Plan:
        return self._narrowing.alive if self._narrowing is not None else {}

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell the controller how the run goes (metrics of an evaluation); it may change what trains next."""
        controller = self._attached.controller
        if controller is not None:
            controller.observe(metrics)
            self.phase = controller.phase(max(self._step, 0))

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, on validation data; modes and random state come back as they were."""
        assert self._evaluate is not None  # `attach` refuses methods that review a run without
        with evaluating(self.model):
            return dict(self._evaluate(self.model))

    def snapshot(self) -> None:
        """Remember model and optimizer as they are, in main memory and in `state_dict`, in place of the last one."""
        self._snapshot = {
            "model": {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()},
            "moments": self._optimizer.moments() if self._optimizer is not None else [],
        }

    @torch.no_grad()
    def rollback(self) -> None:
        """Return model and optimizer to the last snapshot; steps, learning rates and the controller go on.

        Raises:
            PruneError: no snapshot was taken, or the model was cut after it.
        """
        if self._snapshot is None:
            raise PruneError(
                "there is no snapshot to return to: none was taken, or shrink_now() has cut the model since."
            )
        # In place: loading would first give tensors of narrowed models their shapes, and DDP then no longer sees them.
        for name, value in self.model.state_dict().items():
            value.copy_(self._snapshot["model"][name])
        if self._optimizer is not None and self._snapshot["moments"]:
            self._optimizer.set_moments(self._snapshot["moments"])

    def _set_plan(self, plan: Plan) -> None:
        alive = self._alive
        for gate in self._attached.gates:
            gate.set_keep(plan[gate.name] & alive[gate.name] if gate.name in alive else plan[gate.name])

    def shrink_now(self, plan: Plan | None = None) -> None:
        """Cut units out of the model, the optimizer's state and the gates for good, while the run goes on.

        Training goes on as if the units were masked, at lower cost (dropout draws other numbers for other shapes).
        Plans, scores and the report stay in units of the model as it was attached; parameters, parameter groups and
        gates stay the same objects. Units of groups under LayerNorm-like statistics and of head widths, whose cut is
        not exact or moves a scale into weights, stay as zeros until `finalize`; so do all when several processes train,
        after `keep_whole`, and where the optimizer's state has no part for each unit.

        plan: the units that stay, of any groups; what the gates keep now, where omitted.

        Raises:
            PruneError: the method has gates that cannot be cut, or the model would not run: the units are masked only.
        """
        narrowing = self._narrowing if self._attached else None
        if narrowing is None:
            raise PruneError(
                f"method {self.config.method!r} has no masks over dimension groups that could be cut while it runs; "
                "its units are removed by finalize()."
            )
        if plan is not None:
            narrowing.check(plan)
            self._set_plan({**self.plan, **plan})
        narrowing.cut(self.plan, self._optimizer)
        self._snapshot = None  # of a model of other shapes

    def keep_whole(self, reason: str) -> None:
        """Have `shrink_now` only mask units for good, because of what wraps the model (torch.compile, say)."""
        if self._attached.shrink_at and self._narrowing is not None:
            self._narrowing.keep_whole(reason)

    @property
    def plan(self) -> Plan:
        """Weight or group name -> bool keep mask over its units, as the gates have it now."""
        return {gate.name: gate.keep() for gate in self._attached.gates}

    @property
    def sparsity(self) -> float:
        """Fraction of prunable weights that the current plan removes."""
        return sparsity(self._attached.structures, self.plan)

    @property
    def at_goal(self) -> bool:
        """Whether the schedule has reached its end, so that metrics from here on are those of a finished model."""
        schedule = self._attached.schedule
        return schedule is None or schedule(self._progress) >= 1.0

    def batch_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The training loss of one labelled batch, by the method's own passes where it has them.

        model: what the loop calls: the pruned model, or what wraps it (DDP, compile).
        """
        passes = self._attached.passes
        if passes is not None:
            return passes(self, model, inputs)
        outputs = model(**inputs, **self.student_inputs)
        return self.loss(outputs.loss, outputs, inputs)

    def loss(
        self,
        task_loss: Tensor | None,
        outputs: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        """The training loss of one batch: task, distillation and penalties.

        `scale` multiplies what is added to the task loss; pass `1 / accumulation steps` where the task loss has
        already been divided. `outputs` and `inputs` are needed with a teacher. Without labels there is no task loss:
        None is taken where `DistillConfig(alpha=1)` does not count it.
        """
        recipe, share = self._attached, 1.0
        terms: dict[str, Tensor] = {}
        if self.distiller is not None:
            if outputs is None or inputs is None:
                raise PruneError("distillation needs the model's outputs and inputs: loss(task_loss, outputs, inputs).")
            terms = self.distiller.terms(outputs, inputs)
            share -= self.distiller.config.alpha
        if self.phase.penalties_active:
            terms |= {name: penalty(self._progress) for name, penalty in recipe.penalties.items()}
        self._last_terms = {name: term.detach() for name, term in terms.items()}
        added = [scale * term for term in terms.values()]
        if share == 0.0:
            return reduce(torch.add, added)
        if task_loss is None:
            raise PruneError("there is no task loss; give the model labels, or train on a teacher alone with alpha=1.")
        return reduce(torch.add, added, share * task_loss)

    @property
    def student_inputs(self) -> dict[str, Any]:
        """Extra inputs that the model must be called with while training (`output_hidden_states`, ...)."""
        return self.distillation.student_flags if self.distillation is not None else {}

    def logs(self) -> dict[str, float]:
        """What a progress bar or TensorBoard should show: sparsity, prices, loss terms, what steers them."""
        values = {"sparsity": self.sparsity, **{name: float(term) for name, term in self._last_terms.items()}}
        if priced := prices(self.graph, units_to_cut(self._attached.structures, self.plan)):
            values["multiply_adds_kept"] = priced["multiply_adds"]["kept"] / priced["multiply_adds"]["dense"]
        if self.distiller is not None:
            values["temperature"] = self.distiller.config.temperature
        weight = getattr(self._attached.controller, "weight", None)
        return values if weight is None else {**values, "penalty_weight": weight}

    def baked(self) -> tuple[nn.Module, Report]:
        """A finished copy of the model as it is now; the run goes on untouched."""
        copy = copy_with_gates(self.model)
        return copy, self._bake(copy)

    def finalize(self) -> Report:
        """Fold the gates, shrink what lost units, and leave a plain model; returns what was done.

        Where it raises, no score or mask is lost, and it can be called again.
        """
        report = self._bake(self.model)
        self._release()
        self.report = report
        return report

    def _release(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.recipe, self.distiller, self._narrowing, self._optimizer = None, None, None, None
        self._last_terms, self._snapshot = {}, None

    def detach(self) -> None:
        """Take the gates out again, before any step was made: the model is the plain one that it was."""
        for gate in self._attached.gates:
            gate.fold(self.model)
        if self._narrowing is not None:
            self._narrowing.finish(self.model)
        self._release()

    def _bake(self, model: nn.Module) -> Report:
        return bake(model, self._attached, self.graph, self._narrowing, self.config, self.method.PAPER)

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run needs beside model and optimizer; plain numbers and tensors."""
        controller = self._attached.controller
        return {
            "config": self.config.to_json(),
            "step": self._step,
            "progress": self._progress,
            "share": self._share,
            "fixed": self._fixed,
            "cuts": self._cuts,
            "controller": controller.state_dict() if controller is not None else {},
            "snapshot": self._snapshot,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            PruneError: the state belongs to a run with another config.
        """
        if state["config"] != self.config.to_json():
            raise PruneError(
                f"the checkpoint was written with another pruning config; it had\n{state['config']}\n"
                "Resume with that one: PruneConfig.from_json reads it."
            )
        self._step, self._progress = state["step"], state["progress"]
        self._share, self._fixed, self._cuts = state["share"], state["fixed"], state["cuts"]
        self._snapshot = state["snapshot"]
        controller = self._attached.controller
        if controller is not None:
            controller.load_state_dict(state["controller"])
            self.phase = controller.phase(self._step)

    @property
    def _attached(self) -> Recipe:
        if self.recipe is None:
            state = "finalized" if self.report is not None else "not attached yet"
            raise PruneError(f"this Pruner is {state}; call attach() first, and finalize() last.")
        return self.recipe


def _listed(teacher: Teacher | Sequence[Teacher] | None) -> list[Teacher]:
    if teacher is None:
        return []
    return [teacher] if isinstance(teacher, (nn.Module, str, Path)) else list(teacher)


def _check_goal(config: PruneConfig, method: ModuleType) -> None:
    if config.goal is not None and config.goal.name not in method.GOALS:
        raise PruneError(
            f"method {config.method!r} takes {' or '.join(method.GOALS)} as its goal, got {config.goal.name}."
        )
