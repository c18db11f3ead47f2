"""Files are whole or absent."""

from __future__ import annotations

import hashlib

import pytest

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic, atomic_dir, read_json, sha256, write_json


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_replaces_only_on_success(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    with atomic(path) as part:
        assert part.parent == path.parent and part.suffix == ".mp4"
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and _names(path.parent) == ["a.mp4"]


def test_atomic_dir_replaces_only_on_success_and_only_when_told(tmp_path):
    path = tmp_path / "step-000001"
    with atomic_dir(path) as part:
        (part / "sub").mkdir()
        (part / "sub" / "x").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "x").read_text() == "1"
    with pytest.raises(UserError, match="not empty"), atomic_dir(path):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_dir(path, replace=True) as part:
        (part / "y").write_text("half")
        raise KeyboardInterrupt
    assert _names(path) == ["sub"] and _names(tmp_path) == ["step-000001"]
    with atomic_dir(path, replace=True) as part:
        (part / "y").write_text("2")
    assert _names(path) == ["y"] and _names(tmp_path) == ["step-000001"]


def test_atomic_dir_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match="is a file"), atomic_dir(tmp_path / "a", replace=True):
        pass


def test_json_and_hash(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": [1, 2.5, "é"]})
    assert read_json(path) == {"a": [1, 2.5, "é"]}
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text('{"a": ')
    with pytest.raises(UserError, match="a.json is not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match="b.json does not exist"):
        read_json(tmp_path / "b.json")
