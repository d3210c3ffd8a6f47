"""Dataclasses as files: dictionaries, JSON and YAML, with unknown keys refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class ConfigFile:
    """A dataclass of plain values gains ``to_dict``, ``from_dict`` and the same for JSON and YAML."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with these fields, the others at their defaults.

        Raises:
            ValueError: a key that is no field, with the fields that are nearest to it.
        """
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [name for name in values if name not in known]
        if unknown:
            import difflib

            near = [match for name in unknown for match in difflib.get_close_matches(name, known, 2)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"{cls.__name__}: unknown fields {', '.join(map(repr, unknown))}{hint}")
        return cls(**values)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON, written to ``path`` where one is given."""
        return _written(json.dumps(self.to_dict(), indent=1) + "\n", path)

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """From a JSON file, or from JSON text that starts with a brace.

        Raises:
            ValueError: no JSON object. FileNotFoundError: no such file.
        """
        return cls.from_dict(_mapping(source, json.loads, str(source).lstrip().startswith("{")))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """As YAML, written to ``path`` where one is given."""
        return _written(_yaml().safe_dump(self.to_dict(), sort_keys=False), path)

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """From a YAML file, or from YAML text of several lines.

        Raises:
            ValueError: no YAML mapping. FileNotFoundError: no such file. ImportError: PyYAML is not installed.
        """
        return cls.from_dict(_mapping(source, _yaml().safe_load, isinstance(source, str) and "\n" in source))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """From a .json, .yaml or .yml file.

        Raises:
            ValueError: another ending, or what the readers raise.
        """
        ending = Path(path).suffix.lower()
        if ending == ".json":
            return cls.from_json(Path(path))
        if ending in (".yaml", ".yml"):
            return cls.from_yaml(Path(path))
        raise ValueError(f"{path}: expected a file that ends in .json, .yaml or .yml")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a .json, .yaml or .yml file."""
    reader = json.loads if Path(path).suffix.lower() == ".json" else _yaml().safe_load
    return dict(_mapping(Path(path), reader, False))


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML configurations need PyYAML: install the extra memkern[models]") from error
    return yaml


def _mapping(source: str | Path, reader: Any, is_text: bool) -> Mapping[str, Any]:
    text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
    where = "text" if is_text else str(source)
    try:
        content = reader(text)
    except Exception as error:  # json and yaml have errors of their own kinds
        raise ValueError(f"{where}: cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a mapping of fields, got {type(content).__name__}")
    return content


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    return text
