"""Two import packages out of one repository: `megatron3d` and, from `kernels/`, `megatron3d_kernels`.

`kernels/` itself is a plain folder: as a package it would shadow the package of that name by Hugging Face.
"""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron3d", "megatron3d.*"]), *find_packages("kernels")],
    package_dir={"megatron3d": "megatron3d", "megatron3d_kernels": "kernels/megatron3d_kernels"},
    package_data={"megatron3d": ["py.typed", "config/foreign/*.toml"], "megatron3d_kernels": ["py.typed"]},
)
