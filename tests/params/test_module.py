"""ParallelModule: declared parameters have no memory until materialized, and nothing undeclared slips in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron3d.params.init import initial_shard
from megatron3d.params.module import ParallelModule, declared_parameters, materialize, materialize_all
from megatron3d.params.spec import Init

CPU = torch.device("cpu")


class Leaf(ParallelModule):
    """A matrix cut along its columns and a replicated bias."""

    def __init__(self, tp: int) -> None:
        super().__init__(tp=tp)
        self.declare("weight", (4, 8), init=Init("normal", 1.0), decays=True, tp_dim=1)
        self.declare("bias", (4,), init=Init("ones"), decays=False)


class Tree(nn.Module):
    """Two leaves under names of their own."""

    def __init__(self, tp: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"3": Leaf(tp)})
        self.head = Leaf(tp)


def test_declared_parameters_have_their_local_shape_and_no_memory() -> None:
    leaf = Leaf(tp=4)
    assert leaf.weight.is_meta and tuple(leaf.weight.shape) == (4, 2)
    assert tuple(leaf.bias.shape) == (4,)
    huge = ParallelModule(tp=8)
    huge.declare("weight", (1_000_000, 1_000_000), init=Init("zeros"), decays=True, tp_dim=0)
    assert huge.weight.numel() == 125_000_000_000


def test_names_are_full_and_the_same_at_every_degree() -> None:
    names = ["layers.3.weight", "layers.3.bias", "head.weight", "head.bias"]
    for tp in (1, 2):
        declared = declared_parameters(Tree(tp))
        assert list(declared) == names == [one.spec.name for one in declared.values()]
        assert declared["head.weight"].spec.tp_gradient == "sharded"
        assert declared["head.bias"].spec.tp_gradient == "equal"


def test_an_undeclared_parameter_is_refused_by_name() -> None:
    tree = Tree(1)
    tree.layers["3"].register_parameter("gain", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"layers\.3\.gain was registered without `declare`"):
        declared_parameters(tree)


def test_parameters_of_plain_modules_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"1\.weight was registered without"):
        declared_parameters(nn.Sequential(Leaf(1), nn.Linear(2, 2)))


def test_a_module_used_twice_is_declared_once() -> None:
    tree = Tree(1)
    tree.again = tree.head
    assert list(declared_parameters(tree)) == ["layers.3.weight", "layers.3.bias", "head.weight", "head.bias"]


def test_materializing_gives_a_parameter_its_initial_shard_and_replaces_it_in_its_module() -> None:
    tree = Tree(2)
    one = declared_parameters(tree)["head.weight"]
    assert one.parameter.is_meta
    made = materialize(one, seed=3, tp=2, tp_rank=1, device=CPU, dtype=torch.bfloat16)
    assert tree.head.weight is made is one.parameter and made.requires_grad
    assert torch.equal(made, initial_shard(one.spec, seed=3, tp=2, tp_rank=1).to(torch.bfloat16))


def test_materializing_all_leaves_nothing_on_the_meta_device() -> None:
    tree = Tree(2)
    materialize_all(tree, seed=3, tp=2, tp_rank=0, device=CPU)
    assert all(not p.is_meta and p.dtype == torch.float32 for p in tree.parameters())
    assert not torch.equal(tree.head.weight, tree.layers["3"].weight), "values go by full name"
