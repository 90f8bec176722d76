"""`--compile`: one set of graphs for each kind of block, cut only where it should be, and refusals in a sentence.

What compiled blocks compute is held against one process in tests/parity/test_compiled.py, with the whole compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch._inductor.cpp_builder
from megatron3d_kernels.launch import TritonSupport
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch._inductor.exc import InvalidCxxCompiler

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.batch import GPTBatch
from megatron3d.errors import ConfigError
from megatron3d.train import compiling, setup
from megatron3d.train.compile_failed import compile_failed
from megatron3d.train.compiling import compile_blocks, require_compiler
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import train_step
from tests.parity.compare import relative
from tests.parity.runs import RATES, VOCAB_SIZE, Case, config_of, parts_of, trace

pytestmark = pytest.mark.skipif(torch.__version__ < "2.12", reason="--compile is refused with torch before 2.12")

MOST_GRAPHS = 12  # of one block: one between any two of its calls that are not traced
CPU = torch.device("cpu")
ABSENT = TritonSupport(installed=False, interpreted=False, detail="Triton cannot be imported")
COMPILED = TritonSupport(installed=True, interpreted=False, detail="Triton 3")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def parts_with(model: str, options: str = "") -> TrainingSetup:
    """Parts whose blocks are traced and differentiated as by --compile, and not made into code."""
    with mock.patch.object(setup, "compile_blocks", partial(compile_blocks, backend="aot_eager")):
        return parts_of(Case(model, Layout(), f"--compile {options}"), make_mesh(Layout()))


def samples(length: int) -> GPTBatch:
    """Random ones."""
    tokens_BS = torch.randint(VOCAB_SIZE, (8, length + 1), generator=torch.Generator().manual_seed(1))
    return GPTBatch(tokens_BS[:, :-1], tokens_BS[:, 1:], torch.ones(8, length))


def test_layers_and_steps_share_the_graphs_of_one_and_train_alike() -> None:
    parts = parts_with("llama-drops")
    found, expected = trace(parts, num_steps=2), trace(parts_of(Case("llama-drops", Layout()), parts.mesh), num_steps=2)
    assert relative(found.losses, expected.losses) < 1e-6
    for name, pieces in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name][0][1], pieces[0][1], atol=1e-5, rtol=0)
    again = [one.recompile_reason for one in get_compilation_metrics() if one.recompile_reason]
    assert not again, f"some layers or steps have graphs of their own: {again}"
    assert parts.compiled is not None and 2 <= parts.compiled.num_graphs <= MOST_GRAPHS
    assert f"1 kind of block for 4 layers, {parts.compiled.num_graphs} graphs in " in parts.compiled.news(2)[0]
    assert parts.compiled.news(2) == [], "nothing more was compiled"


def test_graphs_end_only_where_layers_ask_for_it() -> None:
    parts = parts_with("experts-many", "--num-layers 2 --moe-layer-freq ([0]*1+[1]*1)")
    trace(parts, num_steps=1)
    assert parts.compiled is not None and parts.compiled.num_kinds == 2  # dense and with experts
    assert counters["graph_break"], "no graph ended"
    others = [why for why in counters["graph_break"] if "`<function call at" not in why or "disable" not in why]
    assert not others, others


def test_more_sizes_than_expected_end_the_run_with_a_sentence() -> None:
    with mock.patch.object(compiling, "VARIANTS", 1):
        parts = parts_with("gpt2", "--num-layers 1")
    train_step(parts, samples(16), RATES, step=0)
    with pytest.raises(Exception, match="recompile_limit") as caught:
        train_step(parts, samples(8), RATES, step=1)
    found = compile_failed(caught.value)
    assert isinstance(found, ConfigError) and "as often as it may, each time for other sizes" in str(found)
    assert compile_failed(ValueError("3")) is None


def test_old_torch_and_absent_compilers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--compile needs torch 2\.12 or newer, and this is 2\.11\.0\+cu128"):
        require_compiler(CPU, version="2.11.0+cu128")
    absent = mock.Mock(side_effect=InvalidCxxCompiler())
    with (
        mock.patch.object(torch._inductor.cpp_builder, "get_cpp_compiler", absent),
        pytest.raises(ConfigError, match=r"--compile on cpu needs a C\+\+ compiler"),
    ):
        require_compiler(CPU)
    with pytest.raises(ConfigError, match="--compile needs Triton on cuda"):
        require_compiler(torch.device("cuda"), support=ABSENT)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--seq-length-curriculum truncate --seq-length-curriculum-min-difficulty 8", "--seq-length-curriculum trunc"),
        ("--random-ltd --random-ltd-min 16 --random-ltd-max 16", "with --random-ltd layers see more positions"),
        ("--kernels triton", "--kernels triton asks for those that are there already"),
    ],
)
def test_options_that_contradict_it_are_named(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_of(Case("gpt2", Layout(), f"--compile {options}"))


def test_kernels_are_forced_or_refused() -> None:
    cuda = torch.device("cuda")
    assert setup.forced_kernels("auto", CPU, support=ABSENT) is None
    assert setup.forced_kernels("reference", cuda, support=COMPILED) == "reference"
    assert setup.forced_kernels("triton", cuda, support=COMPILED) == "triton"
    with pytest.raises(ConfigError, match=r"--kernels triton needs Triton and a GPU, or .* and the device is cpu"):
        setup.forced_kernels("triton", CPU, support=COMPILED)
    with pytest.raises(ConfigError, match=r"--kernels triton .* and Triton cannot be imported"):
        setup.forced_kernels("triton", cuda, support=ABSENT)
