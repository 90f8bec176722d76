"""Checkpoints that belong to the model and not to the layout: written atomically, checked when read, no pickle.

Read `index` (what a checkpoint is), then `shard_file` (how bytes reach the disk), `ranks` (how all ranks act or fail as
one), `store` (how PyTorch's planner decides who writes and reads what), `publish` (how a finished checkpoint becomes
the latest) and last `save` and `load`, which the rest of the project calls. `async_save` is the save that training does
not wait for: `host_buffer` and `staging` have its copy, `writer` and `writer_process` the process that writes it. The
format is described in docs/checkpoint.md.
"""
