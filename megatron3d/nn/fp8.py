"""How the linear layers of a run compute in fp8, from its options."""

from __future__ import annotations

from megatron3d_kernels.fp8 import E4M3, E5M2

from megatron3d.config.sections.fp8 import GivenFp8
from megatron3d.tensor.fp8_recipe import Fp8Recipe, Fp8Weights, Scaling


def fp8_of(options: GivenFp8, *, weights_stay: bool) -> Fp8Recipe | None:
    """The recipe of --fp8-format and --fp8-recipe; None without the former. Where `weights_stay` for a step, so does
    one cast of them; else it would take the memory that is saved by releasing them."""
    if options.fp8_format is None:
        return None
    scaling: Scaling = "blockwise" if options.fp8_recipe == "blockwise" else "tensorwise"
    dtype = E5M2 if options.fp8_format == "hybrid" else E4M3
    return Fp8Recipe(scaling, dtype, options.fp8_wgrad, Fp8Weights(keeps=weights_stay))
