"""How large the results of operations get, as torch's dispatcher sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestResult(TorchDispatchMode):
    """The most elements of any tensor that an operation gives within the context, of those that `counts` accepts."""

    def __init__(self, counts: Callable[[Tensor], bool] = lambda _: True) -> None:
        super().__init__()
        self.elements = 0
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and self._counts(one):
                self.elements = max(self.elements, one.numel())
        return result
