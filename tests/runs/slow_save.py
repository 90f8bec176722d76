"""pretrain_gpt.py whose saves take long: `python slow_save.py SECONDS FLAGS`. Stands for a large model."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

# An interrupted sleep would be a save that a signal makes shorter: time.sleep goes on after a signal's handler.
from megatron3d.train import state

SCRIPT = Path(__file__).resolve().parents[2] / "pretrain_gpt.py"


def main() -> None:
    """Put a sleep before what a save writes, and run the script."""
    seconds, save = float(sys.argv[1]), state.save_checkpoint

    def slowly(*args: Any, **options: Any) -> Path:
        print(f"saving takes {seconds:g} s", flush=True)
        time.sleep(seconds)
        return save(*args, **options)

    state.save_checkpoint = slowly
    sys.argv = [SCRIPT.name, *sys.argv[2:]]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
