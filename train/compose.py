"""The configuration as Hydra composes it, from the same files with PyYAML alone: for machines without Hydra.

Groups, keys and `${...}` are what `configs/` uses of Hydra's grammar, no more; a test holds both to the same
result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

from flashvsr.base.cli import UserError
from train.config import CONFIGS, TrainConfig, from_dict

REFERENCE = re.compile(r"\$\{([^${}]+)\}")


def compose_yaml(stage: str, overrides: Sequence[str]) -> TrainConfig:
    """The configuration of one stage. Raises UserError for an unknown key, group or value."""
    base = _read("train")
    given = [_split(override) for override in overrides]
    tree: dict[str, Any] = {}
    for entry in base.pop("defaults"):
        if entry == "_self_":
            _merge(tree, base)
            continue
        ((group, name),) = entry.items()
        name = stage if group == "stage" else ([v for k, v in given if k == group] or [name])[-1]
        values = _read(f"{group}/{name}")
        _merge(tree, values if group == "recipe" else {group: values})
    for key, value in given:
        if key not in ("recipe", *tree) or not isinstance(tree.get(key, {}), Mapping):
            _set(tree, key, value)
    return from_dict(_resolved(tree, tree))


def _read(name: str) -> dict[str, Any]:
    path = CONFIGS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"there is no {name}; there are {known}")
    return yaml.safe_load(path.read_text()) or {}


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is no setting: write key=value")
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with suppress(ValueError):  # 1e-5, which YAML 1.1 takes for text
            value = float(value)
    return key, value


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    if not isinstance(node, dict) or last not in node:
        raise UserError(f"unknown key {dotted!r}; see configs/train.yaml for the keys")
    node[last] = value


def _resolved(value: Any, tree: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {k: _resolved(v, tree) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v, tree) for v in value]
    while isinstance(value, str) and (found := REFERENCE.search(value)):
        node: Any = tree
        for part in found[1].split("."):
            node = node[part]
        whole = found[0] == value
        value = node if whole else value.replace(found[0], str(node))
        if whole and not isinstance(value, str):
            return _resolved(value, tree)
    return value
