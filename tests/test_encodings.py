"""Packed zeros come back bit by bit, in every dtype, and take the bytes they should."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_prune.checkpoint.encodings import DTYPES, ENCODINGS, check_counts, choose, decode, encode
from hf_prune.types import CheckpointError

INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def bits(tensor: Tensor) -> Tensor:
    """Its elements as integers: NaN equals itself, -0.0 differs from 0.0."""
    return tensor.reshape(-1).view(INTS[tensor.element_size()])


def assert_round_trip(tensor: Tensor, kind: str) -> dict[str, Tensor]:
    stored = encode(tensor, kind)
    back = decode(kind, stored, tensor.shape)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))
    assert all(part.ndim == 1 for part in stored.values())
    return stored


def random_tensor(shape: tuple[int, ...], density: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern, NaN and inf among them, in about `density` of the elements."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    size = torch.empty((), dtype=dtype).element_size()
    info = torch.iinfo(INTS[size])
    values = torch.randint(info.min, info.max, shape, generator=generator, dtype=torch.int64).to(INTS[size])
    return values.where(kept, 0).view(dtype)


@pytest.mark.parametrize("kind", ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple).filter(lambda shape: prod(shape) < 20_000),
    density=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.125, 0.5, 0.99, 1.0]),
    dtype=st.sampled_from([*FLOATS, torch.int8, torch.float64, torch.int64]),
    seed=st.integers(0, 1 << 30),
)
def test_round_trip_of_any_bits(kind, shape, density, dtype, seed):
    assert_round_trip(random_tensor(shape, density, dtype, seed), kind)


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("run", [0, 1, 254, 255, 256, 257, 511, 512, 513, 767, 768, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_runs_of_zeros_around_a_byte(kind, run, dtype):
    row = torch.cat([torch.zeros(run), torch.ones(1), torch.zeros(run), torch.ones(2), torch.zeros(run)])
    assert_round_trip(row.unsqueeze(0).to(dtype), kind)


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_keep_their_bits(kind, dtype):
    special = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]], dtype=dtype)
    stored = assert_round_trip(special, kind)
    assert len(stored[""]) == 6  # the zero of negative sign is a value


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1), (3, 5, 7)])
def test_empty_and_odd_sizes(kind, shape):
    assert_round_trip(torch.zeros(shape), kind)
    assert_round_trip(torch.ones(shape), kind)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_strided_tensors(kind):
    wide = random_tensor((40, 60), 0.1, torch.float32, 0)
    assert_round_trip(wide.T, kind)
    assert_round_trip(wide[::2, 1::3], kind)


def test_long_runs_store_one_zero_in_256():
    row = torch.zeros(1, 1001)
    row[0, 1000] = 5.0
    stored = encode(row, "gap8")
    assert stored["_gaps"].tolist() == [255, 255, 255, 232]
    assert stored[""].tolist() == [0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize(
    ("density", "kind"), [(0.0, "gap8"), (0.05, "gap8"), (0.2, "bitmask"), (0.9, "bitmask"), (1.0, None)]
)
def test_choice_is_the_smallest(density, kind):
    tensor = random_tensor((200, 300), density, torch.float32, 0)
    assert choose(tensor) == kind
    sizes = {None: tensor.nbytes}
    sizes |= {name: sum(part.nbytes for part in encode(tensor, name).values()) for name in ENCODINGS}
    assert min(sizes, key=sizes.__getitem__) == kind


def test_small_and_flat_tensors_stay_plain():
    assert choose(torch.zeros(4, 4)) is None
    assert choose(torch.zeros(100_000)) is None
    assert choose(torch.zeros(400, 400, dtype=torch.complex64)) is None


def test_ninety_percent_sparse_fp32_is_at_least_seven_and_a_half_times_smaller():
    tensor = random_tensor((768, 768), 0.1, torch.float32, 0)
    assert choose(tensor) == "gap8"
    assert tensor.nbytes / sum(part.nbytes for part in encode(tensor, "gap8").values()) >= 7.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_may_be_cast_before_decoding(dtype):
    tensor = torch.randn(30, 40).masked_fill(torch.rand(30, 40) < 0.8, 0.0)
    for kind in ENCODINGS:
        stored = encode(tensor, kind)
        stored[""] = stored[""].to(dtype)
        assert torch.equal(decode(kind, stored, (30, 40)), tensor.to(dtype))


def test_dtype_names_are_torch_names():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)


BYTE = torch.tensor([255], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "side", "values", "shape", "message"),
    [
        ("gap8", BYTE.repeat(3), 3, (2, 100), "reach position 768"),
        ("gap8", BYTE.repeat(1), 2, (20, 100), "1 values, but 2"),
        ("bitmask", BYTE.repeat(2), 8, (1, 8), "2 bytes"),
        ("bitmask", BYTE.repeat(1), 7, (1, 7), "past the last"),
        ("bitmask", BYTE.repeat(1), 7, (1, 8), "8 values, but 7"),
    ],
)
def test_sides_that_do_not_fit_are_refused(kind, side, values, shape, message):
    with pytest.raises(CheckpointError, match=message):
        check_counts(kind, values, [side], shape)
    with pytest.raises(CheckpointError, match=message):
        decode(kind, {"": torch.zeros(values), f"_{ENCODINGS[kind].sides[0]}": side}, shape)
