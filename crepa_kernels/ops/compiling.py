"""What torch.compile is told about functions of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Has torch.compile call ``function`` while it traces, with constant arguments, and keep its result.

    ``torch.compiler.assume_constant_result`` does the same, and imports the compiler to do it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
