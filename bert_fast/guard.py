"""What was found out about a model's modules, kept for as long as they stay as they were.

To look a model through takes longer than a short text does; to see that nothing has changed takes microseconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

from . import _C

T = TypeVar("T")

# Entries of a module's __dict__ that no forward pass reads, or that every call may change.
UNREAD = frozenset(
    {
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "bert_fast_calls",
    }
)

# Entries whose own entries count as well.
CONTAINERS = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def watch(root: nn.Module) -> _C.Guard:
    """A guard that holds while no module below root, nor an attribute, hook, parameter or mode of one, is replaced.

    Of root itself only what is there now is watched, not what is added.

    It does not see into attributes, such as a configuration object, nor into tensors. It keeps the modules below root
    alive, not root.
    """
    guard = _C.Guard()
    for module in root.modules():
        attributes = module.__dict__
        if module is not root:
            guard.expect_type(module)
            guard.expect_size(attributes)
        for name in attributes:
            if name not in UNREAD:
                guard.expect_item(attributes, name)
        for name in CONTAINERS:
            container = attributes[name]
            guard.expect_size(container)
            for key in container:
                guard.expect_item(container, key)
    return guard


class Kept(Generic[T]):
    """Values by their module, each made anew when the module or anything below it has changed."""

    def __init__(self) -> None:
        self._values: weakref.WeakKeyDictionary[nn.Module, tuple[_C.Guard, type, T]] = weakref.WeakKeyDictionary()

    def get(self, root: nn.Module, make: Callable[[], T]) -> T:
        """The value kept for root, or a new one. What `make` raises is passed on, and nothing kept."""
        found = self._values.get(root)
        if found is not None and found[1] is type(root) and found[0].holds():
            return found[2]
        value = make()
        self._values[root] = (watch(root), type(root), value)
        return value

    def forget(self, root: nn.Module) -> None:
        self._values.pop(root, None)
