"""Stage: the consecutive layers of a model that one pipeline rank runs together.

A stage takes one hidden tensor [S, B, H] (or, on the first, the tokens of its own micro-batch) and returns one hidden
tensor (or, on the last, a scalar from which the backward starts). Tokens, masks and labels come from the rank's own
reading of the batch, so shapes are known beforehand and nothing but hidden tensors crosses the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.moe.layer import MixtureOfExperts
from megatron3d.nn.block import Block
from megatron3d.nn.context.shards import ContextShards
from megatron3d.nn.documents import Rectangles
from megatron3d.nn.dropout import DropoutStream
from megatron3d.nn.inputs import KeyValueCache, LayerInputs
from megatron3d.nn.loss_sink import LossSink, LossSpec
from megatron3d.nn.positions import rotary_table
from megatron3d.nn.recompute import ContextPair, LayerGroup, plan_recompute, run_layers
from megatron3d.nn.token_dropping import TokenDropping, on_kept_positions
from megatron3d.params.freeze import freeze
from megatron3d.params.gate import WeightUse
from megatron3d.params.module import Declared, declared_parameters
from megatron3d.params.spec import ParamSpec
from megatron3d.tensor.context import LayerContext, unsharded_context

FROZEN = ".frozen"  # ends the name of a unit whose parameters do not train
_TABLES = (["embedding", "word"], ["head", "output"])  # of the vocabulary, each of which is a unit of its own


@dataclass(frozen=True)
class MicroBatch:
    """What every stage knows of one micro-batch.

    Attributes:
        tokens_BS: token ids, int64, of the whole sequence; where samples are cut over context-parallel ranks, of this
            rank's part of it, and so is everything else with an S.
        labels_BS: the token to predict at each position, int64; None asks the last stage for logits.
        loss_mask_BS: weight of each position's loss, fp32.
        label_index_P: the positions that are predicted, as numbers in [S, B] flattened, int64, in models that predict
            few of them.
        position_ids_BS: positions, int64, [B, S], or [1, S] of all samples alike; None is 0 .. S-1.
        attention_mask_BST: True where position S may attend to position T, [B, S or 1, T]; None is the model's own
            attention, causal in a GPT and to every position in a BERT.
        rectangles: what attends to what in samples of packed documents, instead of a mask (`nn/documents.py`).
        token_types_BS: the segment of each token, int64, where the model distinguishes segments.
        sentence_labels_B: the class of each sample, int64, for models that score sentences or pairs of them; fp32
            values for those that measure.
        sample_weights_B: weight of each sample's loss, fp32, in models that score samples alone; None weighs all alike.
        losses: takes the sums of the model's losses; None where there are no labels.
        dropout: the random numbers of this forward's dropout; None drops nothing.
        cache: keys and values of earlier tokens, for generation.
        dropping: which positions each layer sees; None lets all see all, as in evaluation.
        shards: how the samples are cut over context-parallel ranks; None where they are not.
    """

    tokens_BS: Tensor
    labels_BS: Tensor | None = None
    loss_mask_BS: Tensor | None = None
    label_index_P: Tensor | None = None
    position_ids_BS: Tensor | None = None
    attention_mask_BST: Tensor | None = None
    token_types_BS: Tensor | None = None
    sentence_labels_B: Tensor | None = None
    sample_weights_B: Tensor | None = None
    losses: LossSink | None = None
    dropout: DropoutStream | None = None
    cache: KeyValueCache | None = None
    dropping: TokenDropping | None = None
    rectangles: Rectangles | None = None
    shards: ContextShards | None = None


@dataclass(frozen=True)
class StagePart:
    """Which part of a model a stage is: the numbers of its layers, and whether the first or last stage."""

    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class StageModules:
    """The modules of a stage, the context of its layers, and the losses that the model declares, those of other stages
    included; the embedding and the head are None where the stage has none. `replay` keeps what the collectives of
    recomputed layers give."""

    embedding: nn.Module | None
    blocks: Mapping[int, nn.Module]
    head: nn.Module | None
    groups: tuple[LayerGroup, ...]
    context: LayerContext
    losses: tuple[LossSpec, ...]
    replay: ContextPair | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError if two losses have one name."""
        names = [spec.name for spec in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses are known by their names, and two of these are alike: {', '.join(names)}")


class Stage(nn.Module):
    """Embedding (first stage), blocks, and head (last stage), under names that are the same at every layout."""

    def __init__(self, config: ModelConfig, part: StagePart, modules: StageModules) -> None:
        super().__init__()
        self.config, self.part, self.groups = config, part, modules.groups
        self.embedding = modules.embedding
        self.layers = nn.ModuleDict({str(number): block for number, block in modules.blocks.items()})
        self.head = modules.head
        self.context, self.gate = modules.context, modules.context.gate
        self.losses, self.replay = modules.losses, modules.replay

    def forward(self, x_SBH: Tensor | None, micro: MicroBatch) -> Tensor:
        """Run the stage.

        Args:
            x_SBH: output of the stage before (S local under sequence parallelism); None on the first stage.
            micro: the micro-batch.

        Returns:
            Hidden [S, B, H]; on the last stage a scalar from which the backward starts (the sums of the losses are in
            `micro.losses`), or, where `micro` has no labels, this rank's logits [S, B, Vp/tp].
        """
        inputs = self._layer_inputs(micro)
        if self.part.is_first:
            assert self.embedding is not None, "the first stage has the embedding"
            self.gate.open("embedding")
            x_SBH = self.gate.close("embedding", self.embedding(micro, inputs))
            if self.config.has_experts and torch.is_grad_enabled() and not x_SBH.requires_grad:
                # A gradient reaches every layer with experts, frozen or not: ranks whose own experts are frozen take
                # part in the exchanges of the backward, and loads are counted there at every layout.
                x_SBH = x_SBH.detach().requires_grad_()
        assert x_SBH is not None, "only the first stage runs without a hidden tensor"
        layers = [
            on_kept_positions(self._gated(f"layers.{number}", layer), int(number), self.context)
            for number, layer in self.layers.items()
        ]
        store = self.context.kept_inputs
        x_SBH = run_layers(layers, self.groups, x_SBH, inputs, replay=self.replay, store=store)
        if self.head is None:
            return x_SBH
        tied = not self.config.untie_embeddings_and_output_weights
        assert not tied or self.embedding is not None, "a tied last stage has a copy of the table"
        table = self.embedding.word if self.embedding is not None and tied else self.head.output
        x_SBH = self.gate.open("head", x_SBH)
        return self.gate.close("head", self.head(x_SBH, micro, table))

    def _gated(self, place: str, layer: nn.Module) -> Callable[[Tensor, LayerInputs], Tensor]:
        """A layer between the opening and the closing of its place, which a recomputation passes too."""

        def run(x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
            return self.gate.close(place, layer(self.gate.open(place, x_SBH), inputs))

        return run

    def places(self) -> dict[str, WeightUse]:
        """Which units the stage's places read, in the order of the forward."""
        units = list(self.units())
        embedding = tuple(name for name in units if self.part.is_first and name.startswith("embedding"))
        places = {}
        if self.part.is_first:
            # The lookup in the word table does not read the table again; norms beside it, where a model has them, do.
            again = tuple(name for name in embedding if not name.startswith("embedding.word"))
            places["embedding"] = WeightUse(embedding, again)
        for number in self.layers:
            layer = tuple(name for name in units if name.split(".")[:2] == ["layers", number])
            places[f"layers.{number}"] = WeightUse(layer, layer)
        if self.head is not None:
            head = tuple(name for name in units if name.startswith("head"))
            head += () if self.tied_unit is None else (self.tied_unit,)
            places["head"] = WeightUse(head, head)
        return places

    def parameters_by_name(self) -> dict[str, Declared]:
        """Declared parameters by full name; a tied table that this stage both embeds and projects with stands once."""
        return declared_parameters(self)

    def units(self) -> dict[str, list[str]]:
        """Parameter names by unit: the word embedding, the rest of the embedding, each block, the output layer of an
        untied model, the rest of the head.

        The word embedding is a unit of its own so that, where it is tied, its holders lay it out alike; and so are
        both tables because stage 3 of ZeRO cuts a large one into blocks of rows. Frozen
        parameters are in units of their own, which have weights alone, and so are those of each kind but "dense",
        whose gradients other ranks sum.
        """
        units: dict[str, list[str]] = {}
        for name, declared in self.parameters_by_name().items():
            units.setdefault(unit_of(declared.spec), []).append(name)
        return units

    @property
    def tied_unit(self) -> str | None:
        """Name of the unit that holds a tied table, whose gradient is the sum over its holders; None if untied."""
        if self.config.untie_embeddings_and_output_weights:
            return None
        is_frozen = any(name.startswith(f"embedding.word{FROZEN}") for name in self.units())
        return f"embedding.word{FROZEN if is_frozen else ''}"

    def uses_of(self, name: str) -> int:
        """How many contributions to its gradient a parameter gets in one backward of this stage."""
        tied = not self.config.untie_embeddings_and_output_weights
        both_ends = self.part.is_first and self.part.is_last
        return 2 if tied and both_ends and name == "embedding.word.weight" else 1

    def _layer_inputs(self, micro: MicroBatch) -> LayerInputs:
        rotary = None
        if self.config.position_embedding_type == "rope":
            tokens = micro.tokens_BS
            with torch.no_grad():
                rotary = rotary_table(self.config, tokens.shape[1], micro.position_ids_BS, device=tokens.device)
        return LayerInputs(
            rotary,
            micro.attention_mask_BST,
            micro.cache,
            micro.dropout,
            micro.losses,
            dropping=micro.dropping,
            rectangles=micro.rectangles,
            shards=micro.shards,
        )


class BlockBuilder(Protocol):
    """Makes the block of one layer: a module from ([S, B, H] of the residual stream, `LayerInputs`) to [S, B, H]."""

    def __call__(
        self, config: ModelConfig, context: LayerContext, *, layer: int, recompute_core: bool, mlp_chunks: int = 1
    ) -> nn.Module:
        """`recompute_core` asks for attention that recomputes its core in the backward; `mlp_chunks`, which is given
        where a run asks for it, for an MLP that runs over so many chunks of the sequence."""
        ...


def model_block(
    config: ModelConfig, context: LayerContext, *, layer: int, recompute_core: bool, mlp_chunks: int = 1
) -> Block:
    """The block of a layer as the model's options describe it: with experts where it has some."""
    experts = MixtureOfExperts if config.experts_of(layer) else None
    return Block(
        config, context, layer=layer, recompute_core=recompute_core, mlp_chunks=mlp_chunks, feed_forward=experts
    )


StageBuilder = Callable[[ModelConfig, TrainConfig, StagePart, LayerContext], Stage]


def assemble_stage(
    config: ModelConfig,
    train: TrainConfig,
    part: StagePart,
    context: LayerContext,
    *,
    embedding: nn.Module | None,
    head: nn.Module | None,
    losses: tuple[LossSpec, ...],
    block: BlockBuilder = model_block,
    reads_first_only: bool = False,
) -> Stage:
    """A stage with the blocks of its part between a model's own ends, recomputed as `train` says.

    `losses` are all that the model declares, on every stage alike. `block` makes its blocks. `reads_first_only` says
    that the head reads the first position alone: then the block before it (a `Block`) computes no other, unless the
    sequence is cut over ranks, where that position would be the work of one of them.
    """
    selective, num_chunks = train.recompute_granularity == "selective", train.mlp_chunks_for_training
    chunks = {"mlp_chunks": num_chunks} if num_chunks > 1 else {}

    def context_of(layer: int) -> LayerContext:
        return context if train.has_fp8(layer, config.num_layers) else context.without_fp8()

    blocks = {
        layer: block(config, context_of(layer), layer=layer, recompute_core=selective, **chunks)
        for layer in part.layers
    }
    is_whole = not context.sequence_parallel and context.cp.size == 1
    if head is not None and reads_first_only and part.layers and is_whole:
        last = part.layers[-1]
        blocks[last] = Block(config, context_of(last), layer=last, recompute_core=selective, first_only=True)
    groups = plan_recompute(
        len(part.layers),
        granularity=train.recompute_granularity,
        method=train.recompute_method,
        layers_each=train.recompute_num_layers,
    )
    replay = context.replay.contexts if train.recompute_reuse_communication else None
    stage = Stage(config, part, StageModules(embedding, blocks, head, groups, context, losses, replay))
    freeze(stage, train.freeze_params)
    return stage


def whole_stage(model: ModelConfig, train: TrainConfig, build: StageBuilder) -> Stage:
    """The whole of a resolved model as one stage on the meta device, not cut in any direction."""
    return build(model, train, StagePart(range(model.num_layers), True, True), unsharded_context())


def unit_of(spec: ParamSpec) -> str:
    """The unit a parameter belongs to, from its full name, its kind and whether it trains."""
    words = spec.name.split(".")
    if words[0] == "layers":
        unit = f"layers.{words[1]}"
    else:
        unit = ".".join(words[:2]) if words[:2] in _TABLES else words[0]
    kind = "" if spec.kind == "dense" else f".{spec.kind}"
    return f"{unit}{kind}{'' if spec.trains else FROZEN}"
