"""Configs: a strict JSON round trip, and one sentence that names the field for every bad value."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_prune import MovementConfig, PruneError
from hf_prune.config import GOALS, PruneConfig
from hf_prune.methods import METHODS, config_from_dict, load

GLOBS = st.lists(st.text(min_size=1, max_size=12), max_size=3).map(tuple)
SHARE = st.floats(0.0, 1.0)


@st.composite
def movement_configs(draw: Any) -> MovementConfig:
    sparsity = draw(st.floats(0.001, 0.999))
    begin, end = sorted(draw(st.lists(SHARE, min_size=2, max_size=2, unique=True)))
    return MovementConfig(
        final_sparsity=sparsity,
        include=draw(GLOBS),
        exclude=draw(GLOBS),
        structure=draw(st.sampled_from(["element", "block", "row", "column", "neuron", "hybrid"])),
        scope=draw(st.sampled_from(["global", "per_group"])),
        begin=begin,
        end=end,
        min_keep=draw(st.floats(0.0, 1.0 - sparsity)),
        seed=draw(st.integers(0, 2**31)),
        variant=draw(st.sampled_from(["hard", "soft", "l0", "magnitude"])),
        block_shape=tuple(draw(st.lists(st.integers(1, 64), min_size=2, max_size=2))),
        score_lr=draw(st.floats(1e-6, 1.0)),
        score_init=draw(st.none() | st.floats(-10, 10)),
        penalty_weight=draw(st.none() | st.floats(1e-3, 1e3)),
        freeze_embeddings=draw(st.booleans()),
    )


@given(movement_configs())
def test_json_round_trip(config: MovementConfig) -> None:
    again = MovementConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config) and again.to_json() == config.to_json()
    assert config_from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("goal", GOALS)
def test_the_goal_is_the_field_that_is_set(goal: str) -> None:
    config = PruneConfig(**{goal: 0.25})
    assert config.goal is not None
    assert (config.goal.name, config.goal.value) == (goal, 0.25)
    assert config.goal.kept(0.0) == 1.0
    assert config.goal.kept(1.0) == (0.75 if goal == "final_sparsity" else 0.25)


def test_without_a_goal_there_is_none() -> None:
    assert PruneConfig().goal is None


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity must be a number in \[0, 1\), got 1\.0"),
        ({"final_sparsity": -0.1}, "final_sparsity must be a number"),
        ({"final_sparsity": float("nan")}, "final_sparsity must be a number"),
        ({"final_sparsity": "0.5"}, "final_sparsity must be a number"),
        ({"final_sparsity": True}, "final_sparsity must be a number"),
        ({"target_flops": 0.0}, r"target_flops must be a number in \(0, 1\], got 0\.0"),
        ({"target_params": 1.5}, "target_params must be a number"),
        ({"target_latency": "fast"}, "target_latency must be a number"),
        ({"target_bytes": -1}, "target_bytes must be a number"),
        ({"max_metric_drop": -0.01}, "max_metric_drop must be a number"),
        ({"max_metric_drop": "little"}, "max_metric_drop must be a number"),
        ({"final_sparsity": 0.5, "target_flops": 0.5}, "one goal, got final_sparsity, target_flops"),
        ({"begin": 0.5, "end": 0.5}, r"begin=0\.5, end=0\.5"),
        ({"begin": 0.8, "end": 0.2}, r"begin=0\.8, end=0\.2"),
        ({"begin": -0.1}, "begin"),
        ({"end": 1.1}, "end"),
        ({"begin": "early"}, "begin must be a number"),
        ({"end": None}, "end must be a number"),
        ({"min_keep": 1.0}, "min_keep must be a number"),
        ({"scope": "globl"}, "scope must be one of global, per_group, got 'globl'; did you mean 'global'"),
        ({"include": "bert.*"}, r"include must be a tuple of globs, got the string 'bert\.\*'; write \('bert\.\*',\)"),
        ({"exclude": "head"}, "exclude must be a tuple of globs"),
        ({"include": None}, "include must be a tuple of globs"),
        ({"seed": 1.0}, r"seed must be a whole number, got 1\.0"),
        ({"width_multiple": True}, "width_multiple must be a whole number, got True"),
        ({"exclude": (1,)}, "exclude must be a tuple of globs"),
    ],
)
def test_bad_shared_fields(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint) as caught:
        PruneConfig(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"variant": "soft", "penalty_weight": 0.0}, "penalty_weight must be > 0 for variant 'soft'"),
        ({"variant": "soft", "penalty_weight": -1.0}, "penalty_weight must be a number"),
        ({"variant": "l0", "penalty_weight": 0}, "penalty_weight must be > 0 for variant 'l0'"),
        ({"variant": "soft", "penalty_weight": "much"}, "penalty_weight must be a number"),
        ({"final_sparsity": 0}, "final_sparsity is 0, so nothing would ever be pruned"),
        ({"final_sparsity": None}, "variant 'hard' needs final_sparsity"),
        ({"variant": "magnitude", "final_sparsity": None}, "variant 'magnitude' needs final_sparsity"),
        ({"variant": "sotf"}, "variant must be one of .*; did you mean 'soft'"),
        ({"structure": "rows"}, "structure must be one of .*; did you mean 'row'"),
        ({"score_optimizer": "adam"}, "score_optimizer must be one of"),
        ({"score_lr": 0}, "score_lr must be a number in"),
        ({"score_lr": "slow"}, "score_lr must be a number"),
        ({"score_init": "low"}, "score_init must be a number"),
        ({"threshold": 1.0}, "threshold must be a number in"),
        ({"penalty_gain": -1.0}, "penalty_gain must be a number"),
        ({"block_shape": (32,)}, "block_shape must be two positive sizes"),
        ({"block_shape": ()}, "block_shape must be two positive sizes"),
        ({"block_shape": (0, 4)}, "block_shape must be two positive sizes"),
        ({"block_shape": (4, 4, 4)}, "block_shape must be two positive sizes"),
        ({"block_shape": (4.5, 4)}, "block_shape must be two positive sizes"),
        ({"block_shape": 32}, "block_shape must be two positive sizes"),
        ({"final_sparsity": 0.9, "min_keep": 0.2}, "min_keep=0.2 .* final_sparsity=0.9"),
    ],
)
def test_bad_movement_fields(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint) as caught:
        MovementConfig(**{"final_sparsity": 0.5, **values})
    assert "\n" not in str(caught.value)


def test_unknown_keys_name_the_closest() -> None:
    with pytest.raises(
        ValueError, match=r"MovementConfig has no field 'final_sparcity'; did you mean 'final_sparsity'\?"
    ):
        MovementConfig.from_dict({"final_sparcity": 0.5})
    with pytest.raises(ValueError, match="has no field 'zzz'; known: begin, block_shape"):
        MovementConfig.from_dict({"zzz": 1})


def test_the_config_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="MovementConfig is the config of 'movement', got a config of 'resrep'"):
        MovementConfig.from_dict({"method": "resrep", "final_sparsity": 0.5})
    with pytest.raises(PruneError, match="there is no method 'movment'; did you mean 'movement'"):
        config_from_dict({"method": "movment"})
    with pytest.raises(PruneError, match="needs the key 'method'"):
        config_from_dict({"final_sparsity": 0.5})


@pytest.mark.parametrize("method", METHODS)
def test_a_method_adds_at_most_twelve_fields(method: str) -> None:
    shared = {field.name for field in dataclasses.fields(PruneConfig)}
    own = [field.name for field in dataclasses.fields(load(method).Config) if field.name not in shared]
    assert len(own) <= 12, own
