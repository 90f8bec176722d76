"""Linear layers in 8-bit floating point; docs/fp8.md has what the options mean, `rules/fp8.py` what they need."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import off_switch, option, switch

FP8_RECIPES = ("tensorwise", "blockwise")


@dataclass(frozen=True)
class GivenFp8:
    """The options of fp8."""

    fp8_format: str | None = option(
        None,
        "--fp8-format",
        "Compute linear layers in fp8: e4m3, or hybrid with gradients in e5m2 (docs/fp8.md).",
        choices=("e4m3", "hybrid"),
    )
    fp8_recipe: str = option(
        "tensorwise",
        "--fp8-recipe",
        "The scales of fp8: tensorwise has one for each tensor, blockwise one for each block of 128 or 128 x 128.",
    )
    fp8_wgrad: bool = off_switch(
        "--no-fp8-wgrad", "Keep the products of weight gradients in bf16.", also=("--disable-fp8-wgrad",)
    )
    first_last_layers_bf16: bool = switch(
        "--first-last-layers-bf16", "Keep the first and the last layers of the model in bf16."
    )
    num_layers_at_start_in_bf16: int = option(
        1, "--num-layers-at-start-in-bf16", "With --first-last-layers-bf16: how many of the first.", unit="layers"
    )
    num_layers_at_end_in_bf16: int = option(
        1, "--num-layers-at-end-in-bf16", "With --first-last-layers-bf16: how many of the last.", unit="layers"
    )

    def has_fp8(self, layer: int, num_layers: int) -> bool:
        """Whether the linear layers of a layer, counted from 0, compute in fp8."""
        if self.fp8_format is None or not self.first_last_layers_bf16:
            return self.fp8_format is not None
        return self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16
