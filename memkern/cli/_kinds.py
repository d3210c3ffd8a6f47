"""Which family of models a configuration or a model folder belongs to, and the module that handles it.

A family's module has ``train(fields, resume, out)``, ``evaluate(model, dataset, options, out)`` and, where it makes
sense, ``predict(model, dataset, options, out)``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The value of ``kind`` in a configuration -> the module.
KINDS = {"xlnet": "memkern.cli._xlnet", "self_rag": "memkern.cli._rag", "hybrid": "memkern.cli._rag"}
# ``model_type`` in a model's config.json -> kind.
MODEL_TYPES = {
    "xlnet": "xlnet",
    "memxlnet": "xlnet",
    "gmm_xlnet": "xlnet",
    "memkern_self_rag": "self_rag",
    "memkern_hybrid": "hybrid",
}
CONFIGS = Path(__file__).parents[1] / "configs"


def handler(kind: str) -> Any:
    """The module of a family.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return importlib.import_module(KINDS[kind])


def presets() -> list[str]:
    """Names of the configurations that ship with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(name: str, changes: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The kind and the fields of a configuration file or of a preset, with ``name=value`` changes (values in YAML).

    Raises:
        ValueError: neither a file nor a preset, or a change without an equals sign.
    """
    from memkern.training.config_file import read_mapping

    path = Path(name)
    if not path.is_file():
        path = CONFIGS / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"config: {name!r} is no file and no preset; presets are {', '.join(presets())}")
    fields = read_mapping(path) | changed(changes)
    return str(fields.pop("kind", "xlnet")), fields


def changed(changes: Sequence[str]) -> dict[str, Any]:
    """What ``--set name=value`` options say.

    Raises:
        ValueError: one without an equals sign.
    """
    found = {}
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise ValueError(f"--set: expected name=value, got {change!r}")
        found[key.strip()] = _value(value)
    return found


def kind_of_model(folder: Path) -> str:
    """The family of a saved model.

    Raises:
        ValueError: no model in the folder, or one of no family of ours.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "memxlnet_config.json").is_file() or (folder / "gmm_config.json").is_file():
            return "xlnet"
        raise ValueError(f"model: no config.json in {folder}")
    found = json.loads(path.read_text()).get("model_type")
    if found not in MODEL_TYPES:
        raise ValueError(f"model: {folder} holds a {found!r}, expected one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[found]


def _value(text: str) -> Any:
    import yaml

    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:  # YAML takes 1e-4 for a word
            return float(value)
        except ValueError:
            return value
    return value
