"""Counts the operations that torch executes."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountOperations(TorchDispatchMode):
    """A context that counts calls of torch operations, except those that compute nothing: views and empty tensors.

    On a GPU, most operations launch one kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.names.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "profiler::")):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))
