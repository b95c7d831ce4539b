"""YAML as its version 1.2 reads it: in PyYAML's 1.1 `no` is false, `1e-4` text and `1:30` ninety."""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2.2, section 10.3.2: tag, what is one, and what it may begin with.
_CORE = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", tuple("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
)
_BASES = {"0o": 8, "0x": 16}
_Refused = yaml.constructor.ConstructorError


class CoreLoader(yaml.SafeLoader):
    """Plain values alone: keys are text and appear once, and no value is a name for another.

    Raises yaml.MarkedYAMLError with the place.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - none of SafeLoader's

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # A few nested ones are a text of gigabytes.
            event = self.peek_event()
            raise _Refused(None, None, f"*{event.anchor} stands for another value, write that", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != f"{_TAG}str":
                shown = key.start_mark.buffer[key.start_mark.pointer : key.end_mark.pointer]
                raise _Refused(None, None, f"the key {shown} is no text", key.start_mark)
            if key.value in seen:
                problem = f"each key may appear once; repeated: {key.value}"
                raise _Refused(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_core_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        base = _BASES.get(text[:2], 10)
        return int(text, base)


for _name, _pattern, _first in _CORE:
    CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _first)
CoreLoader.add_constructor(f"{_TAG}int", CoreLoader.construct_core_int)
