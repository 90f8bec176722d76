"""What becomes of Megatron-LM's flags that are no option of ours: a synonym, accepted with a line, or refused by name.

The rule: a flag is *accepted* where nobody counts on its effect, because leaving it out changes neither the trained
weights, nor what is read and saved, nor what protects the run. So an old launch script starts and says in one line what
it lost. A flag of whose feature somebody would be deprived in silence is *refused*, with what to use instead. A
*synonym* sets one of our options to a fixed value; it yields to that option's own flag.

The rows are data, in `megatron_flags.toml`, which names the version of Megatron-LM that it follows. Anything else is an
unknown flag (see `flags.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron3d.config.foreign.flag_table import FlagTable, read_flag_table

MEGATRON: FlagTable = read_flag_table(Path(__file__).with_name("megatron_flags.toml"))
