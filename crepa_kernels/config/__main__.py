"""Every key with its default, rule and meaning, from the schemas: what docs/options.md holds.

python -m crepa_kernels.config > docs/options.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from . import CrepaConfig, LayerSyncConfig, UrepaConfig
from .base import Settings

HEAD = """# Options

Written by `python -m crepa_kernels.config > docs/options.md` from the schemas. Each key is one of `CrepaConfig`,
`UrepaConfig` or `LayerSyncConfig`, of the file of settings (JSON, or TOML and YAML by its suffix; null is the default),
and an option of the command line (`--crepa_lambda 0.3`). A wrong value is one error that names key, value and rule, and
so is a contradiction of several keys."""
PRESETS = """`CrepaConfig.preset(name)` and `--preset`; what is empty is the default. The block is that of the
transformer's [family](families.md)."""
# U-REPA's settings have iREPA's keys as well as CREPA's.
SECTIONS: tuple[tuple[str, type[Settings], str], ...] = (
    ("CREPA, and REPA on transformers of images", CrepaConfig, "crepa_"),
    ("iREPA, beside CREPA or U-REPA", CrepaConfig, "irepa_"),
    ("U-REPA, on UNets", UrepaConfig, "urepa_"),
    ("LayerSync", LayerSyncConfig, "layersync_"),
)


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _keys(kind: type[Settings], prefix: str) -> str:
    rows = []
    for key, field in kind.model_fields.items():
        if key.startswith(prefix):
            meaning, _, rule = (field.description or "").rpartition("; must be ")
            rows.append((f"`{key}`", _code(field.default), rule, meaning))
    return _table(("key", "default", "must be", "what it is"), rows)


def _other_names(kind: type[Settings]) -> str:
    names = {alias: f"another name of `{key}`" for alias, key in kind.ALIASES.items()}
    names |= {key: f"of SimpleTuner, not supported: {_code(off)} or null" for key, off in kind.UNSUPPORTED.items()}
    return _table(("key", "what it is"), ((f"`{key}`", said) for key, said in names.items()))


def _presets(kind: type[Settings]) -> str:
    keys = dict.fromkeys(key for preset in kind.PRESETS.values() for key in preset)
    rows = [[f"`{key}`", *(_code(p[key]) if key in p else "" for p in kind.PRESETS.values())] for key in keys]
    return _table(("key", *(f"`{name}`" for name in kind.PRESETS)), rows)


def page() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for title, kind, prefix in SECTIONS:
        parts += [f"## {title}", _keys(kind, prefix)]
    parts += ["## Other names", _other_names(CrepaConfig)]
    return "\n\n".join([*parts, "## Presets", PRESETS, _presets(CrepaConfig)])


if __name__ == "__main__":
    print(page())
