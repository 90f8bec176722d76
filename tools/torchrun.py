"""torchrun with --shutdown-timeout on every torch: the same arguments, the same work.

    python tools/torchrun.py --nproc-per-node 8 --shutdown-timeout 600 \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 pretrain_gpt.py ...

torchrun itself has the option from torch 2.13 on; older ones kill a run 30 s after a signal, whatever it saves. See
docs/stopping.md.
"""

from __future__ import annotations

from megatron3d.comm.agent import main

if __name__ == "__main__":
    main()
