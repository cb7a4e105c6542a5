from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import Tensor

from infformer.memory.state import MemoryState


@dataclass(frozen=True)
class Layer(MemoryState):
    coefficients: Tensor
    segments: Tensor


@dataclass(frozen=True)
class Layers(MemoryState):
    layers: tuple[MemoryState, ...]


@dataclass(frozen=True)
class Mixed(MemoryState):
    """Every kind of field at once."""

    tensor: Tensor
    nested: Layer
    layers: tuple[MemoryState, ...]


def layer(rows: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    return Layer(torch.randn(rows, 4, 3, generator=generator), torch.arange(1, rows + 1) * (seed + 1))


@pytest.fixture
def state() -> Mixed:
    return Mixed(
        torch.arange(9.0).view(3, 3) + 1,
        layer(3, seed=0),
        (Layers((layer(3, seed=1), layer(3, seed=2))),),
    )


def assert_equal(one: MemoryState, other: MemoryState) -> None:
    assert type(one) is type(other)
    ours, theirs = one.named_tensors(), other.named_tensors()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_tensors_are_named_by_their_place(state):
    assert list(state.named_tensors()) == [
        "tensor",
        "nested.coefficients",
        "nested.segments",
        "layers.0.layers.0.coefficients",
        "layers.0.layers.0.segments",
        "layers.0.layers.1.coefficients",
        "layers.0.layers.1.segments",
    ]
    assert state.named_tensors()["layers.0.layers.1.segments"] is state.layers[0].layers[1].segments


def test_map_reaches_every_tensor_and_keeps_the_structure(state):
    doubled = state.map_tensors(lambda tensor: 2 * tensor)
    assert type(doubled.layers[0].layers[1]) is Layer
    for name, tensor in state.named_tensors().items():
        assert torch.equal(doubled.named_tensors()[name], 2 * tensor)


def test_a_state_is_frozen(state):
    with pytest.raises(FrozenInstanceError):
        state.tensor = torch.zeros(3, 3)


def test_a_state_returns_from_its_tensors(state):
    empty = state.map_tensors(torch.zeros_like)
    assert_equal(empty.with_tensors(state.named_tensors()), state)


def test_tensors_come_in_any_order_type_and_number_of_rows(state):
    """As a checkpoint of another number of lanes may hold them."""
    stored = {
        name: torch.cat([tensor, tensor]).double() for name, tensor in reversed(list(state.named_tensors().items()))
    }
    restored = state.with_tensors(stored)
    assert_equal(restored, state.select_rows(torch.tensor([0, 1, 2, 0, 1, 2])))


def test_missing_and_unknown_names_are_refused(state):
    named = state.named_tensors()
    named["strange"] = named.pop("tensor")
    with pytest.raises(ValueError, match=r"different parts: \['strange', 'tensor'\]"):
        state.with_tensors(named)


def test_another_shape_is_refused(state):
    named = state.named_tensors() | {"nested.coefficients": torch.zeros(3, 4, 5)}
    with pytest.raises(ValueError, match=r"nested.coefficients .* \[3, 4, 5\].* \[3, 4, 3\]"):
        state.with_tensors(named)


def test_reset_rows_are_empty_and_the_others_stay(state):
    reset = state.reset_rows(torch.tensor([False, True, False]))
    for name, tensor in state.named_tensors().items():
        after = reset.named_tensors()[name]
        assert (after[1] == 0).all()
        assert torch.equal(after[[0, 2]], tensor[[0, 2]])
        assert (tensor[1] != 0).all()  # the old state is untouched


def test_reset_rows_forgets_what_is_not_a_number(state):
    broken = state.map_tensors(lambda tensor: tensor / 0 if tensor.is_floating_point() else tensor)
    reset = broken.reset_rows(torch.tensor([True, True, True]))
    assert all((tensor == 0).all() for tensor in reset.named_tensors().values())


def test_gradients_pass_rows_that_are_not_reset():
    coefficients = torch.ones(2, 4, 3, requires_grad=True)
    state = Layer(coefficients, torch.ones(2, dtype=torch.int64))
    state.reset_rows(torch.tensor([True, False])).coefficients.sum().backward()
    assert torch.equal(coefficients.grad, torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 4, 3))


def test_replaced_rows_are_those_of_the_other_state(state):
    other = state.map_tensors(lambda tensor: -tensor - 5)
    replaced = state.replace_rows(torch.tensor([True, False, True]), other)
    assert type(replaced.layers[0].layers[1]) is Layer
    for name, tensor in state.named_tensors().items():
        after = replaced.named_tensors()[name]
        assert after.dtype == tensor.dtype
        assert torch.equal(after[[0, 2]], other.named_tensors()[name][[0, 2]])
        assert torch.equal(after[1], tensor[1])


def test_rows_of_another_structure_are_refused(state):
    with pytest.raises(ValueError, match="different parts"):
        state.nested.replace_rows(torch.tensor([True, False, True]), state)


def test_selected_rows_are_those_of_the_index(state):
    selected = state.select_rows(torch.tensor([2, 0, 0, 2]))
    for name, tensor in state.named_tensors().items():
        assert torch.equal(selected.named_tensors()[name], tensor[[2, 0, 0, 2]])


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_state_make_it_again(state, parts):
    pieces = state.split(parts)
    assert len(pieces) == parts
    assert all(len(tensor) == 3 // parts for piece in pieces for tensor in piece.named_tensors().values())
    assert_equal(Mixed.concatenate(pieces), state)


def test_rows_that_cannot_be_split_evenly_are_refused(state):
    with pytest.raises(RuntimeError, match="unflatten"):
        state.split(2)


def test_a_state_moves_as_a_whole(state):
    moved = state.to("meta")
    for name, tensor in state.named_tensors().items():
        assert moved.named_tensors()[name].device.type == "meta"
        assert tensor.device.type == "cpu"
    assert_equal(state.to(torch.device("cpu")), state)


def test_a_detached_state_has_no_graph():
    weight = torch.ones(2, 4, 3, requires_grad=True)
    state = Layers((Layer(weight * 2, torch.ones(2, dtype=torch.int64)),))
    detached = state.detach()
    assert state.layers[0].coefficients.requires_grad
    assert not detached.layers[0].coefficients.requires_grad
    assert_equal(detached, state)
