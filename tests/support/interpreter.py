"""Triton's interpreter, faster: what it looks up again at every call of every function is looked up once."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def remember_builtins() -> None:
    """The interpreter lists all of ``triton.language`` for each launch and each function that a kernel calls.

    That is a quarter of a small kernel's time, and what is a builtin there does not change. A Triton without these
    functions stays as it is.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr", "_get_np_dtype")):
        return

    @cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: Any, *rest: Any) -> None:
        found = names(package)
        if found and not is_builtin(getattr(package, found[-1])):
            return  # patched by the kernel that calls this function
        for name in found:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch
    # Its table of types is made anew at each call.
    look_up, known = interpreter._get_np_dtype, {}

    def kept(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    interpreter._get_np_dtype = kept
