"""A file of finished work: a line is added when a piece of work is done, and survives what comes after."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Answers by name in a JSON-lines file; `known` holds what was there and what was added.

    The last line of a killed process may be torn: it is cut off, that work is done again. Use as a context
    manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.known[row["id"]] = row["value"]
                whole += len(line)
            os.truncate(path, whole)

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        return self

    def add(self, name: str, value: Any) -> None:
        """One line, written at once."""
        self._file.write(json.dumps({"id": name, "value": value}, ensure_ascii=False) + "\n")
        self._file.flush()
        self.known[name] = value

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
