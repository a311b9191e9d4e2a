"""Which schema an id means. Today a folder says so; a registry behind a URL will be another `Registry`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Protocol

from streamproc.avro.schema import Schema, load_schema
from streamproc.core.errors import StreamprocError, UserError

__all__ = ["IDS_FILE", "DirectoryRegistry", "Registry", "UnknownSchema"]

IDS_FILE: Final = "ids.json"
_ID_MAX: Final = (1 << 31) - 1


class UnknownSchema(StreamprocError):
    """No schema has this id: the records that carry it become dead letters."""

    def __init__(self, schema_id: int) -> None:
        super().__init__(f"unknown schema id {schema_id}")
        self.schema_id = schema_id


class Registry(Protocol):
    """Asked once per id and decoder; what it answers for an id never changes."""

    def schema_by_id(self, schema_id: int) -> Schema:
        """The writer schema of an id, or `UnknownSchema`."""

    def id_of(self, schema: Schema | str) -> int:
        """The id to write with: of a schema, or of a file name of the registry; `UserError` if it has none."""


class DirectoryRegistry:
    """``.avsc`` files of one folder with their ids in its ``ids.json``: ``{"1": "order.avsc", "2": "order.v2.avsc"}``.

    Everything is read when it is made, so that a wrong file stops the worker before the first record. A file without an
    id may lie in the folder (a type that others use, a reader's schema); an id without a file may not.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = _read_ids(self.folder / IDS_FILE)
        self._schemas = {schema_id: load_schema(self.folder / name) for schema_id, name in self._files.items()}

    def schema_by_id(self, schema_id: int) -> Schema:
        try:
            return self._schemas[schema_id]
        except KeyError:
            raise UnknownSchema(schema_id) from None

    def ids(self) -> dict[int, str]:
        """Every id with its file name."""
        return dict(self._files)

    def id_of(self, schema: Schema | str) -> int:
        """The highest id of the file, or of an equal schema."""
        found = [i for i, name in self._files.items() if self._is(i, name, schema)]
        if found:
            return max(found)
        name = Path(schema if isinstance(schema, str) else schema.source).name
        raise UserError(
            f"The schema {name} has no id in {self.folder / IDS_FILE}.",
            remedy=f'Add a line such as "{max(self._files, default=0) + 1}": "{name}" and put the file beside it.',
        )

    def _is(self, schema_id: int, name: str, schema: Schema | str) -> bool:
        if isinstance(schema, str):
            return Path(schema).name == name
        return bool(self._schemas[schema_id].parsed == schema.parsed)


def _read_ids(path: Path) -> dict[int, str]:
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except FileNotFoundError:
        raise UserError(
            f"The schema folder {path.parent} has no {IDS_FILE}.",
            remedy=f'Make {path} with the id of every writer schema, such as {{"1": "order.avsc"}}.',
        ) from None
    except (OSError, ValueError) as error:
        fact = f"Cannot read {path}: {error}."
        raise UserError(fact, remedy='It must be JSON such as {"1": "order.avsc"}.') from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f"{path} is not a JSON object.", remedy='Write {"1": "order.avsc", ...}.')
    found: dict[int, str] = {}
    for key, name in pairs:
        schema_id = _checked_id(path, key)
        if schema_id in found:
            raise UserError(f"{path} has the id {schema_id} twice.", remedy="Give every schema an id of its own.")
        found[schema_id] = _checked_name(path, schema_id, name)
    return found


def _checked_id(path: Path, key: str) -> int:
    if not (key.isascii() and key.isdigit() and int(key) <= _ID_MAX):
        raise UserError(f"{path}: {key!r} is not a schema id.", remedy=f"An id is a whole number from 0 to {_ID_MAX}.")
    return int(key)


def _checked_name(path: Path, schema_id: int, name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{path}: id {schema_id} names {name!r}.", remedy="Name an .avsc file of the same folder.")
    if not (path.parent / name).is_file():
        raise UserError(
            f"{path}: id {schema_id} names {name}, which is not in the folder.",
            remedy=f"Put {name} there, or take the id out if no record was ever written with it.",
        )
    return name
