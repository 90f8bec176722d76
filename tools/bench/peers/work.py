"""What a benchmark asks of every framework: one model shape, one precision, one layout; and which frameworks there are.

Free of torch, so that the process that starts the others stays small and starts at once. How each framework does the
work is in the module of its `Peer`, which only that peer's own processes import (`serve.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

OURS = "megatron3d"
LAYOUTS = ("dp", "zero1", "zero2", "zero3", "tp", "tp_sp", "pp")
PIPELINE_SPLIT = 4
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
SAMPLES_PER_STEP = 2000


@dataclass(frozen=True)
class Work:
    """One training step as every peer makes it: dropout 0, no clipping, the exact GELU, tied tables, AdamW.

    Attributes:
        micro_batch: sequences of a micro-batch; a step takes `ranks` times as many in every layout.
        layout: how ranks divide the work: "dp", "zero1", "zero2", "zero3", "tp", "tp_sp" or "pp".
        dtype: "fp32", or "bf16" for products in bf16 with fp32 master weights.
        threads: of each process.
        corpus: prefix of the .bin and .idx files where the work is to read samples.
        compiled: whether the model goes through torch.compile, where the peer offers it.
        options: further options of this project's command line, which other peers do not have.
        timeout_s: a peer that gives no answer for as long is killed and named.
    """

    num_layers: int = 6
    hidden_size: int = 384
    num_attention_heads: int = 6
    seq_length: int = 256
    vocab_size: int = 8192
    micro_batch: int = 8
    dtype: str = "fp32"
    layout: str = "dp"
    ranks: int = 1
    threads: int = 2
    compiled: bool = False
    options: str = ""
    corpus: str = ""
    timeout_s: float = 300.0

    @property
    def num_sequences(self) -> int:
        """Sequences of one step, of all ranks together."""
        return self.micro_batch * self.ranks

    @property
    def num_tokens(self) -> int:
        """Tokens of one step."""
        return self.num_sequences * self.seq_length

    @property
    def is_data_parallel(self) -> bool:
        """Whether each rank has sequences of its own."""
        return self.layout in ("dp", "zero1", "zero2", "zero3")

    @property
    def zero_stage(self) -> int:
        """Of ZeRO; 0 in the other layouts."""
        return int(self.layout.removeprefix("zero")) if self.layout.startswith("zero") else 0

    @property
    def tensor_ranks(self) -> int:
        """The degree of tensor parallelism."""
        return self.ranks if self.layout in ("tp", "tp_sp") else 1

    @property
    def pipeline_ranks(self) -> int:
        """The degree of pipeline parallelism."""
        return self.ranks if self.layout == "pp" else 1

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank computes at once: a pipeline takes a quarter, to have enough of them to fill it."""
        return max(1, self.micro_batch // PIPELINE_SPLIT) if self.layout == "pp" else self.micro_batch

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step and rank."""
        return 1 if self.is_data_parallel else self.num_sequences // self.micro_batch_size

    def to_json(self) -> str:
        """As the command line of a peer's process has it."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Peer:
    """A framework that can do the work.

    Attributes:
        name: in tables and on the command line.
        module: with `build(work) -> Trainee`.
        distribution: what must be installed, and whose version is shown.
        install: the line that installs it.
        compiled: whether it runs through torch.compile.
        layouts: those that it does with several ranks.
        note: what a reader of its figures must know.
    """

    name: str
    module: str
    distribution: str
    install: str
    compiled: bool = False
    layouts: tuple[str, ...] = ()
    note: str = ""

    @property
    def version(self) -> str | None:
        """Of the installed distribution; None where there is none."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None


_FOLDER = "tools.bench.peers."
# Distribution, and what installs it.
_TRANSFORMERS = ("transformers", "pip install transformers")
_TORCH = ("torch", "pip install torch")
_DEEPSPEED = ("deepspeed", "pip install deepspeed")
_MEGATRON_CORE = ("megatron-core", "pip install --no-deps megatron-core")
_TORCHTITAN = ("torchtitan", "pip install torchtitan triton")
_OURS = ("megatron3d", "pip install -e .")

_REPLACED = "its calls of torch.cuda replaced, without which it does not train on a CPU"
_LLAMA = "a Llama: rotary positions, RMSNorm, SwiGLU, no biases; attention by torch's kernel in the place of its own"
_DEEPSPEED_ENGINE = Peer("deepspeed", f"{_FOLDER}deepspeed_ranks", *_DEEPSPEED, layouts=LAYOUTS[:4])
_MEGATRON3D = Peer(OURS, f"{_FOLDER}megatron3d_gpt", *_OURS, layouts=LAYOUTS)
PEERS = (
    Peer("transformers", f"{_FOLDER}transformers_gpt2", *_TRANSFORMERS),
    Peer("torch", f"{_FOLDER}plain_torch", *_TORCH),
    Peer("torch-compile", f"{_FOLDER}plain_torch", *_TORCH, compiled=True),
    Peer(
        "litgpt", f"{_FOLDER}litgpt_gpt", "litgpt", "pip install litgpt psutil", note="rotary positions, untied table"
    ),
    Peer("megatron-core", f"{_FOLDER}megatron_core_gpt", *_MEGATRON_CORE, note=_REPLACED),
    _DEEPSPEED_ENGINE,
    Peer("torchtitan", f"{_FOLDER}torchtitan_llama", *_TORCHTITAN, note=_LLAMA),
    _MEGATRON3D,
)
BARE = Peer("bare kernels", f"{_FOLDER}bare_kernels", "megatron3d", "pip install -e .")
# The same with several ranks.
PEERS_ON_RANKS = (
    Peer("torch", f"{_FOLDER}torch_ranks", *_TORCH, layouts=LAYOUTS[:4]),
    _DEEPSPEED_ENGINE,
    Peer(
        "megatron-core",
        f"{_FOLDER}megatron_core_ranks",
        *_MEGATRON_CORE,
        layouts=("dp", "zero1", "tp", "pp"),
        note=_REPLACED,
    ),
    Peer(
        "torchtitan",
        f"{_FOLDER}torchtitan_ranks",
        *_TORCHTITAN,
        layouts=("zero2", "zero3", "tp", "tp_sp", "pp"),
        note=f"{_LLAMA}; untied table in a pipeline",
    ),
    _MEGATRON3D,
)
PEERS_OF_BERT = (
    Peer("transformers", f"{_FOLDER}transformers_bert", *_TRANSFORMERS),
    Peer(OURS, f"{_FOLDER}megatron3d_bert", *_OURS),
)
PEERS_OF_SAMPLES = (
    Peer("torch", f"{_FOLDER}torch_samples", *_TORCH, note="slices of one file, no documents"),
    Peer(
        "megatron-core",
        f"{_FOLDER}megatron_core_samples",
        *_MEGATRON_CORE,
        note="its first start builds index files, later ones read them",
    ),
    Peer(OURS, f"{_FOLDER}megatron3d_samples", *_OURS),
)


def find_peers(names: list[str] | None, table: tuple[Peer, ...] = PEERS) -> list[Peer]:
    """The peers of these names, in the order of the table; all of them for None.

    Raises:
        ValueError: a name is none of them.
    """
    known = {peer.name: peer for peer in table}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"--peers {' '.join(unknown)}: not among {', '.join(known)}")
    return [peer for peer in table if names is None or peer.name in names]
