"""How many of the architectures in tests/zoo.py can be pruned, saved, loaded and pruned again; beside Torch-Pruning.

    pip install --no-deps torch-pruning==1.6.1      # the other tool; its rows are left out where it is missing
    python benchmarks/zoo.py                        # every model with both tools; writes benchmarks/results/zoo.json
    python benchmarks/zoo.py --quick                # three models
    python benchmarks/zoo.py --table                # prints what is there

A cell is one model and one tool in a fresh process with one thread. Of every group that the tool finds (hidden width,
heads, neurons, channels) it removes 30 %, and in a second copy 50 %, of the units: the smallest by L2 norm. Then the
model must answer with tensors of the same shapes as before; must give them bit for bit when it is saved and loaded by
`from_pretrained`, in this process and in a new one; and must be pruned by 30 % once more. Seconds are processor time.

Torch-Pruning gets four recipes from its own examples (`examples/transformers/prune_hf_vit.py`, `prune_hf_bert.py`,
`examples/LLMs/prune_llm.py`): the plain one of its README, whole heads, width within heads, and the last without the
residual streams, whose writers our graph names. Each has the output layer ignored, knows the heads, and has the
attributes of attention modules repaired afterwards as the examples do, by a list of the names that transformers uses;
the recipe that works and keeps the fewest parameters counts. Its own way to save, a pickle of the module, is tried too.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cells
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

RATIOS = (0.3, 0.5)
AGAIN = 0.3
LIMIT_SECONDS = 60
"""Of processor time, for one model and tool; Torch-Pruning's recipes share it evenly."""
PEER = "torch_pruning"
TOOLS = ("hf_prune", PEER)
STEPS = {
    "runs": "runs",
    "loads": "loads",
    "loads_in_new_process": "loads in a new process",
    "pruned_again": "pruned again",
}
QUICK = ("BertForSequenceClassification", "ResNetForImageClassification", "LlamaForSequenceClassification")

Result = dict[str, Any]
Inputs = Mapping[str, Tensor]


class TimeLimit(BaseException):
    """Processor time is up. No `Exception`, so that nothing on the way catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` inside once the process has used that much processor time."""

    def stop(*_: Any) -> None:
        raise TimeLimit(f"over {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measure(cell: cells.Cell) -> Result:
    """One model with one tool."""
    import transformers
    import zoo

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    needs = zoo.ZOO[cell["model"]].needs
    if needs and importlib.util.find_spec(needs) is None:
        return {"skipped": f"needs {needs}, which is not installed"}
    model, inputs = zoo.build(cell["model"], torch.float32)
    begin = time.process_time()
    with redirect_stdout(io.StringIO()):
        result = {"hf_prune": with_hf_prune, PEER: with_peer}[cell["tool"]](model, inputs)
    return {**result, "seconds": time.process_time() - begin}


def attempt(result: Result, work: Callable[[], None], seconds: float) -> None:
    """Run `work`, which fills `result`, and note what stopped it."""
    try:
        with time_limit(seconds):
            work()
    except TimeLimit as error:
        result["stopped"] = f"time limit: {error}"
    except Exception as error:  # noqa: BLE001  whatever a tool raises is its result
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).partition("\n")[0]
        result["stopped"] = f"{type(error).__name__}: {text[:300]} ({Path(place.filename).name}, {place.name})"


@torch.no_grad()
def answer(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    from hf_prune.graph.trace import call, distinct_tensors

    return call(model, distinct_tensors(model), inputs)


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_and_answer(kind: str, folder: Path, inputs: Inputs) -> list[Tensor]:
    """What the model of class `kind` saved in `folder` answers; also run in a new process."""
    import transformers

    from hf_prune.testing import aligned

    torch.set_num_threads(1)
    return answer(aligned(getattr(transformers, kind).from_pretrained(folder).eval()), inputs)


def check_loading(found: Result, model: nn.Module, inputs: Inputs, wanted: list[Tensor], save: Callable) -> None:
    """Whether `from_pretrained` gives the saved model back, here and in a new process."""
    kind = type(model).__name__
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        found["loads"] = same(load_and_answer(kind, Path(folder), inputs), wanted)
        if not found["loads"]:
            return
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            elsewhere = pool.submit(load_and_answer, kind, Path(folder), inputs).result()
        found["loads_in_new_process"] = same(elsewhere, wanted)


def runs(model: nn.Module, inputs: Inputs, before: list[Tensor]) -> list[Tensor]:
    """The answers of `model`, which must look like those `before`."""
    found = answer(model, inputs)
    shapes = [[tuple(tensor.shape) for tensor in each] for each in (before, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs have shapes {shapes[1]}, before pruning {shapes[0]}")
    return found


# hf_prune


def with_hf_prune(model: nn.Module, inputs: Inputs) -> Result:
    from hf_prune.graph import trace

    result: Result = {"pruned": {}}
    dense, before = parameters(model), answer(model, inputs)

    def work() -> None:
        begin = time.process_time()
        graph = trace(model, inputs)
        result.update(trace_seconds=time.process_time() - begin, groups=len(graph.groups), frozen=len(graph.frozen))
        for ratio in RATIOS:
            found: Result = result["pruned"].setdefault(str(ratio), {})
            pruned = copy.deepcopy(model)
            cut(pruned, graph, ratio)
            found["parameters_kept"] = parameters(pruned) / dense
            wanted = runs(pruned, inputs, before)
            found["runs"] = True
            check_loading(found, pruned, inputs, wanted, save_with_hf_prune)
            cut(pruned, trace(pruned, inputs), AGAIN)
            runs(pruned, inputs, before)
            found["pruned_again"] = parameters(pruned) / dense < found["parameters_kept"]

    attempt(result, work, LIMIT_SECONDS)
    return result


def cut(model: nn.Module, graph: Any, ratio: float) -> None:
    """Remove the units of smallest L2 norm from every group of `graph`, `ratio` of them."""
    from hf_prune.checkpoint import mark
    from hf_prune.graph import shrink
    from hf_prune.parts.scores import unit_norms
    from hf_prune.parts.structures import group_structure

    units = [group_structure(group, model) for group in graph.groups.values()]
    plan = {}
    for name, scores in unit_norms(model, units, order=2)().items():
        keep = torch.zeros(len(scores), dtype=torch.bool)
        keep[scores.topk(max(1, round(len(scores) * (1 - ratio)))).indices] = True
        plan[name] = keep
    mark(model, shrink(model, graph, plan))


def save_with_hf_prune(model: nn.Module, folder: str) -> None:
    from hf_prune.checkpoint import save_pretrained

    save_pretrained(model, folder)


# Torch-Pruning

RECIPES: dict[str, dict[str, bool]] = {
    "plain": {},
    "heads": {"prune_num_heads": True, "prune_head_dims": False},
    "width": {"prune_num_heads": False, "prune_head_dims": True},
    "no streams": {"prune_num_heads": False, "prune_head_dims": True},
}
PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("qkv_proj",),
    ("qkv",),
    ("query_key_value",),
)
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("attention_head_size", "head_dim", "key_value_proj_dim", "d_kv")
WHOLE = ("all_head_size", "embed_dim", "inner_dim", "dim")
"""Names that attention modules of transformers give to their sizes."""


def with_peer(model: nn.Module, inputs: Inputs) -> Result:
    result: Result = {"pruned": {}, "recipes": {}}
    before = answer(model, inputs)
    streams = stream_writers(model, inputs)
    for recipe, settings in RECIPES.items():
        found = result["recipes"][recipe] = {"pruned": {}}
        ignored = streams if recipe == "no streams" else []

        def work(found: Result = found, settings: dict = settings, ignored: list = ignored) -> None:
            for ratio in RATIOS:
                peer_at_ratio(
                    found["pruned"].setdefault(str(ratio), {}), model, inputs, before, ratio, settings, ignored
                )

        attempt(found, work, LIMIT_SECONDS / len(RECIPES))
    for ratio in map(str, RATIOS):
        tried = [found["pruned"].get(ratio, {}) | {"recipe": name} for name, found in result["recipes"].items()]
        working = [found for found in tried if found.get("runs") and found["parameters_kept"] < 0.95]
        if working:
            result["pruned"][ratio] = min(working, key=lambda found: found["parameters_kept"])
    if len(result["pruned"]) < len(RATIOS):
        result["stopped"] = "; ".join(
            f"{name}: {found.get('stopped', 'over 95 % of the parameters stay')}"
            for name, found in result["recipes"].items()
        )
    return result


def peer_at_ratio(
    found: Result, model: nn.Module, inputs: Inputs, before: list[Tensor], ratio: float, settings: dict, ignored: list
) -> None:
    pruned = copy.deepcopy(model)
    peer_step(pruned, inputs, ratio, settings, ignored)
    found["parameters_kept"] = parameters(pruned) / parameters(model)
    wanted = runs(pruned, inputs, before)
    found["runs"] = True
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    found["pickle_loads"] = same(answer(torch.load(file, weights_only=False), inputs), wanted)
    loading: Result = {}
    try:
        check_loading(loading, pruned, inputs, wanted, lambda each, folder: each.save_pretrained(folder))
    except Exception as error:  # noqa: BLE001  whatever loading raises is the result
        loading["loading_failed"] = type(error).__name__
    found.update(loading)
    try:
        peer_step(pruned, inputs, AGAIN, settings, ignored)
        runs(pruned, inputs, before)
        found["pruned_again"] = parameters(pruned) / parameters(model) < found["parameters_kept"]
    except Exception as error:  # noqa: BLE001
        found.update(pruned_again=False, again_failed=f"{type(error).__name__}: {str(error)[:200]}")


def peer_step(model: nn.Module, inputs: Inputs, ratio: float, settings: dict, ignored: Sequence[str]) -> None:
    """One pruning step of Torch-Pruning in the form of its examples, and the repair of attributes that follows it."""
    import torch_pruning

    attentions = list(attention_modules(model))
    pruner = torch_pruning.pruner.BasePruner(
        model,
        dict(inputs),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        ignored_layers=[*output_layers(model), *(model.get_submodule(path) for path in ignored)],
        num_heads={layer: heads for _, layers in attentions for layer, heads in layers} if settings else {},
        out_channel_groups=gated(model),
        in_channel_groups={},
        output_transform=lambda output: sum(each.sum() for each in _floats(output)),
        forward_fn=lambda each, given: each(**given),
        **settings,
    )
    pruner.step()
    for module, layers in attentions if settings else ():
        repair(module, layers, pruner.num_heads)


def _floats(output: Any) -> list[Tensor]:
    from hf_prune.graph.trace import answers

    return [tensor for tensor in answers(output) if tensor.is_floating_point()]


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The last linear layer or convolution: the classifier, which must keep its size."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [layer for layer in layers if len(layer.weight) == model.config.num_labels] or layers[-1:]


def attention_modules(model: nn.Module) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, int]]]]:
    """Modules with projections of query, key and value, these layers, and how many heads each has."""
    for module in model.modules():
        heads, own = size_of(module, HEADS), dict(module.named_children())
        for names in PROJECTIONS:
            layers = [own[name] for name in names if isinstance(own.get(name), nn.Linear)]
            if heads and len(layers) == len(names):
                few = size_of(module, KEY_HEADS) or heads
                yield module, list(zip(layers, [heads] + [few] * (len(layers) - 1), strict=True))


def size_of(module: nn.Module, names: Sequence[str]) -> int | None:
    """The first of these attributes that the module, or its config, has."""
    holders = [module, getattr(module, "config", None)]
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def gated(model: nn.Module) -> dict[nn.Module, int]:
    """Layers whose output is two halves, as `prune_llm.py` tells the tool."""
    return {module: 2 for name, module in model.named_modules() if name.endswith("gate_up_proj")}


def repair(module: nn.Module, layers: list[tuple[nn.Module, int]], heads: Mapping[nn.Module, int]) -> None:
    """Set the sizes that an attention module keeps, as the examples do for ViT, BERT and Llama."""
    query = layers[0][0]
    parts = 3 if len(layers) == 1 else 1
    count, few = heads.get(query, layers[0][1]), heads.get(layers[-1][0], layers[-1][1])
    whole = query.out_features // parts
    values = dict.fromkeys(HEADS, count) | dict.fromkeys(KEY_HEADS, few) | {"num_key_value_groups": count // few}
    values |= dict.fromkeys(WIDTHS, whole // count) | dict.fromkeys(WHOLE, whole)
    for name, value in values.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def stream_writers(model: nn.Module, inputs: Inputs) -> list[str]:
    """Modules that write a residual stream, by our graph."""
    from hf_prune.graph import trace
    from hf_prune.types import PruneError

    try:
        graph = trace(model, inputs)
    except PruneError:
        return []
    groups = [*graph.groups.values(), *graph.frozen.values()]
    members = [each for group in groups if group.normalised for each in group.members if not each.reads]
    paths = dict.fromkeys(member.tensor.rpartition(".")[0] for member in members)
    return [path for path in paths if isinstance(model.get_submodule(path), nn.Linear | nn.Conv2d | nn.Embedding)]


# Results


def passes(result: Result, step: str) -> bool:
    """Whether a model passed `step` at both ratios."""
    return all(result["pruned"].get(str(ratio), {}).get(step) is True for ratio in RATIOS)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """How many models pass each step at both ratios, what they keep, and how long it takes."""
    tried = [result for result in results if "skipped" not in result]
    pruned = [result["pruned"] for result in tried if passes(result, "runs")]
    kept = {ratio: [each[str(ratio)]["parameters_kept"] for each in pruned] for ratio in RATIOS}
    seconds = [result["seconds"] for result in tried]
    return {
        "models": len(tried),
        "skipped": len(results) - len(tried),
        **{name: sum(passes(result, step) for result in tried) for step, name in STEPS.items()},
        "stopped by the time limit": sum("time limit" in result.get("stopped", "") for result in tried),
        "seconds, median": round(median(seconds), 1),
        "seconds, most": round(max(seconds), 1),
        **{f"parameters kept at {ratio:.0%}, median": round(median(kept[ratio] or [1.0]), 3) for ratio in RATIOS},
    }


def line(result: Result) -> str:
    """What one tool did with one model."""
    if "skipped" in result:
        return result["skipped"]
    parts = []
    for ratio in RATIOS:
        found = result["pruned"].get(str(ratio), {})
        if found.get("runs"):
            failed = [name for step, name in STEPS.items() if not found.get(step)]
            parts.append(f"{found['parameters_kept']:.2f}" + (f" (not {', '.join(failed)})" if failed else ""))
    return " / ".join(parts) + (f" {result['stopped'][:160]}" if "stopped" in result else "")


def print_table(store: cells.Store, models: Sequence[str]) -> None:
    """Totals, then one line a model: the parameters kept at each ratio, and what failed."""
    tools = [tool for tool in TOOLS if any({"model": model, "tool": tool} in store for model in models)]
    print(f"| | {' | '.join(tools)} |\n|{'---|' * (1 + len(tools))}")
    totals = [
        summary([store[cell] for model in models if (cell := {"model": model, "tool": tool}) in store])
        for tool in tools
    ]
    for name in totals[0] if totals else ():
        print(f"| {name} | {' | '.join(str(each[name]) for each in totals)} |")
    print()
    for model in models:
        found = [{"model": model, "tool": tool} for tool in tools]
        print(f"| {model} | {' | '.join(line(store[cell]) if cell in store else '-' for cell in found)} |")


def main() -> None:
    import zoo

    args = cells.arguments(__doc__.splitlines()[0])
    models = QUICK if args.quick else tuple(zoo.ZOO)
    store = cells.open_store("zoo", args.quick)
    if not args.table:
        tools = [tool for tool in TOOLS if importlib.util.find_spec(tool)]
        todo = [{"model": model, "tool": tool} for tool in tools for model in models]
        cells.run(todo, measure, store, args.workers)
        done = {tool: [store[{"model": model, "tool": tool}] for model in models] for tool in tools}
        store.write(summary={tool: summary(found) for tool, found in done.items()})
    print_table(store, models)


if __name__ == "__main__":
    main()
