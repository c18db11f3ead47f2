"""Rules of the house: import order, light imports, what is tracked."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flashvsr", "data", "eval", "train")

# What a package may take from the others: module prefixes.
MAY_TAKE = {
    "flashvsr": (),
    "data": ("flashvsr.base",),
    "eval": ("flashvsr", "data"),
    "train": ("flashvsr", "data", "eval.metrics"),
}

# Installed only with an extra, or needed only by some commands: imported where they are used.
LAZY = (
    "hydra", "deepspeed", "webdataset", "av", "lpips", "triton", "transformers", "diffusers", "cv2", "wandb",
    "tensorboard", "trackio", "matplotlib", "gradio",
)  # fmt: skip


def imports(source: str) -> set[str]:
    """Every module a source file imports, as dotted names; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def offences(package: str, source: str) -> set[str]:
    """Imports of `source`, a file of `package`, that go against the order."""
    foreign = {name for name in imports(source) if name.split(".")[0] in PACKAGES}
    allowed = (package, *MAY_TAKE[package])
    return {name for name in foreign if not any(name == a or name.startswith(f"{a}.") for a in allowed)}


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_checker_sees_offences():
    assert offences("data", "from flashvsr.base import cli\nimport data.shards, numpy") == set()
    assert offences("data", "def f():\n    from flashvsr.models import dit") == {"flashvsr.models.dit"}
    assert offences("data", "from flashvsr import load") == {"flashvsr.load"}
    assert offences("train", "from eval.metrics import psnr\nfrom eval import metrics") == set()
    assert offences("train", "import eval") == {"eval"}
    assert offences("flashvsr", "import training.tools\nfrom data.shards import x") == {"data.shards.x"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    found = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in sorted((ROOT / package).rglob("*.py"))
        if (bad := offences(package, path.read_text(encoding="utf-8")))
    }
    assert not found


def test_the_ground_floor_and_the_models_stand_alone():
    for path in (ROOT / "flashvsr" / "base").rglob("*.py"):
        own = {name for name in imports(path.read_text(encoding="utf-8")) if name.startswith("flashvsr")}
        assert all(name.startswith("flashvsr.base") for name in own), (path.name, own)
    for path in (ROOT / "flashvsr" / "models").rglob("*.py"):
        assert not any("distributed" in name for name in imports(path.read_text(encoding="utf-8"))), path.name


def test_flashvsr_and_train_import_without_the_extras():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("flashvsr", "train")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("triton")  # a backend that cannot be imported is listed with the reason
    )
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LAZY!r}:
            raise ImportError(f"{{name}} must be imported where it is used")
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tree_stays_small():
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) <= 25 * 2**20
    assert sum(size for path, size in sizes.items() if path.parts[:2] == ("tests", "data")) <= 8 * 2**20


def test_nothing_names_a_place_on_one_machine():
    place = re.compile(rb"(?<![\w.~$}/-])/(?:work|tmp|root|home|Users|mnt)/")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:80]!r}"
        for path in tracked()
        if path != Path(__file__)
        and path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sbatch", ".sh", ""}
        for line in path.read_bytes().splitlines()
        if place.search(line)
    ]
    assert not found
