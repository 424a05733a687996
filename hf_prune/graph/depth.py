"""Take whole layers out of a model, so that its config says so and builds the same model again.

The layers that stay are renumbered and the number in the config that counts them is lowered: a model that lost layers
is an ordinary one, which `from_pretrained` opens without help. That number is found by trying each that could be it;
what the model then computes, and what its config then builds, is compared on the example inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig

from hf_prune.graph.resize import resize, shape_table
from hf_prune.graph.table import is_size
from hf_prune.graph.trace import Inputs, call, distinct_tensors, evaluating
from hf_prune.types import LayerStack, Plan, PruneError, StackLayer


def dropped(stack: LayerStack, keep: Tensor) -> list[StackLayer]:
    """The layers that go, by the keep mask of those that can."""
    return [layer for layer, stays in zip(stack.layers, keep.tolist(), strict=True) if not stays]


def check_layers(stacks: Mapping[str, LayerStack], plan: Plan) -> None:
    """Raise unless every keep mask of `plan` has one bool for each layer that can go, and leaves its stack a layer."""
    for name, keep in plan.items():
        layers = stacks[name].layers
        if keep.dtype != torch.bool or tuple(keep.shape) != (len(layers),):
            raise PruneError(
                f"plan[{name!r}] must be a bool tensor of shape ({len(layers)},), one for each of the layers "
                f"{[layer.index for layer in layers]} that can go, got {keep.dtype} of shape {tuple(keep.shape)}."
            )
        if not keep.any() and len(layers) == stacks[name].size:
            raise PruneError(f"the plan keeps none of the {len(layers)} layers of {name!r}; at least 1 must stay.")


def settle(model: nn.Module, inputs: Inputs, stack: LayerStack) -> LayerStack:
    """`stack` with those of its layers that the model bears to lose, alone and together; the model stays as it is."""
    frozen = dict(stack.frozen)
    for layer in stack.layers:
        if reason := _obstacle(model, inputs, stack, [layer.index]):
            frozen[layer.index] = reason
    layers = tuple(layer for layer in stack.layers if layer.index not in frozen)
    together = [layer.index for layer in layers[1 if len(layers) == stack.size else 0 :]]
    if len(together) > 1 and (reason := _obstacle(model, inputs, stack, together)):
        frozen |= {layer.index: reason for layer in layers}
        layers = ()
    return replace(stack, layers=layers, frozen=dict(sorted(frozen.items())))


def _obstacle(model: nn.Module, inputs: Inputs, stack: LayerStack, gone: Sequence[int]) -> str | None:
    """Why the layers `gone` cannot be taken out, found by doing it and undoing it."""
    undo = _undo(model, stack)
    try:
        _cut(model, inputs, stack, gone)
    except PruneError as error:
        return str(error)
    finally:
        undo()
    return None


def remove_layers(model: nn.Module, inputs: Inputs, stacks: Mapping[str, LayerStack], plan: Plan) -> None:
    """Take the layers that `plan` drops out of `model`, in place; those after them move up.

    Raises:
        PruneError: the plan does not fit, or the model would compute something else; it is left as it was.
    """
    check_layers(stacks, plan)
    done = []
    try:
        for name, keep in plan.items():
            gone = [layer.index for layer in dropped(stacks[name], keep)]
            done.append(_undo(model, stacks[name]))
            if gone:
                _cut(model, inputs, stacks[name], gone)
    except BaseException:
        for undo in reversed(done):
            undo()
        raise


def _cut(model: nn.Module, inputs: Inputs, stack: LayerStack, gone: Sequence[int]) -> None:
    """Take out the layers `gone`; where this raises, the caller undoes it."""
    inputs = pytree.tree_map(lambda each: each.to(_device(model)) if isinstance(each, Tensor) else each, inputs)
    layers: Any = model.get_submodule(stack.name)  # a list or a Sequential
    silent = {name for layer in stack.layers if layer.index in gone for name in layer.parameters}
    wanted = None if stack.normalised else _results(model, inputs, silent)
    for index in sorted(gone, reverse=True):
        del layers[index]
    if not _configs(model):
        _try(model, inputs, wanted)
        return
    problem = _Problem(0, f"no number in {type(model.config).__name__} counts these layers")
    for edit in _edits(_configs(model), stack.size, gone):
        undo = _undo_configs(model)
        try:
            twin = _built(model, edit)
            found = _try(model, inputs, wanted)
            if not all(map(torch.equal, found, _results(twin, inputs))):
                raise _Problem(3, "what the config builds then is another model")
        except _Problem as met:
            undo()
            problem = max(problem, met, key=lambda each: each.after)
        else:
            _renumber(layers, twin.get_submodule(stack.name), stack.size, gone)
            return
    raise PruneError(f"layers {list(gone)} of {stack.name!r} must stay: {problem}.")


class _Problem(PruneError):
    """What is wrong with a model that lost layers; `after`: how many checks it had passed."""

    def __init__(self, after: int, message: str) -> None:
        super().__init__(message)
        self.after = after


def _built(model: Any, edit: Callable[[], None]) -> nn.Module:
    """What the config of `model` builds after `edit`, as `_twin` gives it."""
    try:
        edit()
        return _twin(model, type(model.config).from_dict(model.config.to_dict()))  # as a checkpoint hands it on
    except Exception as error:
        raise _Problem(0, f"no number in {type(model.config).__name__} counts these layers") from error


def _try(model: nn.Module, inputs: Inputs, wanted: Sequence[Tensor] | None) -> list[Tensor]:
    """What `model` answers; raises unless that is `wanted`."""
    try:
        found = _results(model, inputs)
    except Exception as error:
        raise _Problem(1, f"the model does not run without them ({type(error).__name__}: {error})") from error
    if wanted is not None and not _close(wanted, found):
        raise _Problem(2, "other parts of the model read what single layers give")
    return found


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _results(model: nn.Module, inputs: Inputs, silent: set[str] | None = None) -> list[Tensor]:
    """What `model` answers in evaluation mode, the parameters `silent` being zero."""
    tensors = {
        name: torch.zeros_like(tensor) if name in (silent or ()) else tensor
        for name, tensor in distinct_tensors(model).items()
    }
    with evaluating(model), torch.no_grad():
        return call(model, tensors, inputs)


def _close(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Equal up to rounding; NaN is equal to nothing."""
    return len(wanted) == len(found) and all(
        a.shape == b.shape and bool(((a - b).abs().max() <= 1e-5 * a.abs().max()) if a.numel() else True)
        for a, b in zip(wanted, found, strict=True)
    )


def _undo(model: nn.Module, stack: LayerStack) -> Callable[[], None]:
    """A function that gives the stack its layers and the config its values of now."""
    layers = model.get_submodule(stack.name)
    modules = dict(layers._modules)
    values = [(module, dict(vars(module))) for module in layers.modules()]
    undo_configs = _undo_configs(model)

    def undo() -> None:
        for module, own in values:
            vars(module).update(own)
        layers._modules.clear()
        layers._modules.update(modules)
        undo_configs()

    return undo


def _undo_configs(model: nn.Module) -> Callable[[], None]:
    configs = [(config, dict(vars(config))) for config in _configs(model)]

    def undo() -> None:
        for config, own in configs:
            vars(config).clear()
            vars(config).update(own)

    return undo


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The model's config and those inside it; none of a model that is not one of transformers."""
    config = getattr(model, "config", None)
    return list(_within(config)) if isinstance(config, PreTrainedConfig) else []


def _within(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _within(value)


def _edits(configs: Sequence[Any], size: int, gone: Sequence[int]) -> Iterator[Callable[[], None]]:
    """Every change that may tell a config that layers are `gone`: one count lowered, and what it lists by layer cut."""
    for config in configs:
        for name, value in list(vars(config).items()):
            if is_size(value) and value == size:
                counts: list[Any] = [value - len(gone)]
            elif isinstance(value, list | tuple):
                places = [i for i, item in enumerate(value) if is_size(item) and item == size]
                counts = [type(value)((*value[:i], size - len(gone), *value[i + 1 :])) for i in places]
            else:
                continue
            for count in counts:
                yield partial(_lower, config, name, count, size, gone)
                yield partial(setattr, config, name, count)


def _lower(config: Any, name: str, count: Any, size: int, gone: Sequence[int]) -> None:
    """Set `name` to `count`, and cut what else the config lists by layer."""
    for other, items in list(vars(config).items()):
        if isinstance(items, list | tuple) and len(items) == size and other != name:
            setattr(config, other, type(items)(item for i, item in enumerate(items) if i not in gone))
    setattr(config, name, count)
    stages = getattr(config, "stage_names", None)  # of a backbone: its stem and its layers
    if stages and len(stages) == size + 1 and list(config.out_features) == stages[-1:]:
        config.stage_names = stages[: -len(gone)]
        config.out_features = config.stage_names[-1:]


def _twin(model: Any, config: PreTrainedConfig) -> nn.Module:
    """What `config` builds, narrowed like `model` and with its very tensors."""
    table = shape_table(model, lambda: type(model)(copy.deepcopy(config)))
    with torch.device("meta"):
        twin = type(model)(config)
    resize(twin, table)
    twin.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, buffer)
    return twin


def _renumber(layers: nn.Module, twins: nn.Module, size: int, gone: Sequence[int]) -> None:
    """Give modules that know their layer's number the new one, as the twins have it."""
    old = [index for index in range(size) if index not in gone]
    for new, (layer, twin) in enumerate(zip(layers.children(), twins.children(), strict=True)):
        for module, other in zip(layer.modules(), twin.modules(), strict=True):
            for name, value in vars(module).items():
                if is_size(value) and value == old[new] and vars(other).get(name) == new:
                    setattr(module, name, new)
