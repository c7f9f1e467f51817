"""YAML files of settings, read strictly."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2 (1e-4 is one, 010 is ten, 1:30 is none) and no name twice."""

    def __init__(self, stream):
        super().__init__(stream)
        self._merged = set()

    def flatten_mapping(self, node):
        # Once: afterwards what it merges stands in it too.
        if node not in self._merged:
            self._merged.add(node)
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            names = [self.construct_object(key, deep=True) for key in own]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.YAMLError(f"{twice[0]!r} stands in it twice")
        super().flatten_mapping(node)

    def construct_number(self, node):
        text = self.construct_scalar(node)
        return int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else float(text.replace(".inf", "inf"))


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "!number", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$"), list("-+.0123456789")
)
_Loader.add_constructor("!number", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that [`_Loader`] would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def yaml_text(values: dict[str, Any]) -> str:
    """Values as [`read_yaml`] reads them again."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=119)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """
    The values of a YAML file, by name.

    Raises:
        `OSError`: if there is no such file. `ValueError`: if it is no YAML, or holds no names; names the file.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no YAML file ({error}).") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold settings, one `name: value` on each line.")
    return values
