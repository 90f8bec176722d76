"""What becomes of flags of Megatron-LM and its forks that are no option of ours: each has one of three fates.

The rule: a flag is *accepted* where nobody counts on its effect, because leaving it out changes neither the trained
weights, nor what is read and saved, nor what protects the run. So an old launch script starts and says in one line what
it lost. A flag of whose feature somebody would be deprived in silence is *refused*, with what to use instead. A
*synonym* sets one of our options to a fixed value, which that option's own flag must not contradict.

The rows are data, in `megatron_flags.toml`; the flags that two forks added are in `megatron_deepspeed_flags.toml` and
`zero_bubble_flags.toml`. Each file names the version that it follows. Anything else is an unknown flag (see
`flags.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron3d.config.foreign.flag_table import FlagTable, read_flag_table

_FOLDER = Path(__file__).parent

MEGATRON: FlagTable = read_flag_table(_FOLDER / "megatron_flags.toml")
MEGATRON_DEEPSPEED: FlagTable = read_flag_table(_FOLDER / "megatron_deepspeed_flags.toml")
ZERO_BUBBLE: FlagTable = read_flag_table(_FOLDER / "zero_bubble_flags.toml")
# In the order in which a flag is looked up.
TABLES: tuple[FlagTable, ...] = (MEGATRON, MEGATRON_DEEPSPEED, ZERO_BUBBLE)
