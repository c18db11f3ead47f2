"""Files are whole or absent."""

from __future__ import annotations

import hashlib
import os

import pytest

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic, atomic_dir, load_torch, read_json, reading, sha256, write_json


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


def test_reading_turns_errors_into_sentences(tmp_path):
    def said(path, action):
        with pytest.raises(UserError) as error, reading(path):
            action()
        return str(error.value)

    path = tmp_path / "a"
    assert said(path, path.read_text) == f"{path} does not exist; check the path"
    path.symlink_to(tmp_path / "b")
    gone = tmp_path / "b"
    assert said(path, path.read_text).startswith(f"{path} is a link to {gone}, which does not exist")

    def denied():
        raise PermissionError(13, "Permission denied", str(path))

    def worn():
        raise OSError(5, "Input/output error", str(path))

    assert said(path, denied) == f"{path} may not be read by this user; change its permissions or copy it"
    assert said(path, worn) == f"{path} cannot be read (Input/output error); copy it again"


def test_torch_files_are_mapped_and_plain(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    for new in (True, False):  # the old format cannot be mapped and is read all the same
        torch.save({"a": torch.arange(5000)}, path, _use_new_zipfile_serialization=new)
        before = path.read_bytes()
        loaded = load_torch(path)["a"]
        assert torch.equal(loaded, torch.arange(5000))
        loaded.add_(1)
        assert path.read_bytes() == before
    path.write_bytes(before[:100])
    with pytest.raises(UserError, match="a.pth is not a whole file of plain tensors"):
        load_torch(path)


def test_an_atomic_file_has_the_mode_the_umask_gives(tmp_path):
    with atomic(tmp_path / "a") as part:
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
