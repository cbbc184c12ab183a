"""What importing costs, what happens when another 'hooks' is found, and what the wheel holds."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import easi3r
import hooks

ROOT = Path(easi3r.__file__).parents[1]


def run_python(program, cwd, *, path=ROOT):
    """A fresh interpreter that looks in ``cwd`` first, then in ``path``."""
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = [{str(path)!r}]\n{program}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def modules_after(program, cwd):
    done = run_python(f"{program}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))", cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# --- what importing costs


def test_importing_easi3r_loads_nothing_heavy(tmp_path):
    heavy = {"torch", "numpy", "scipy", "cv2", "PIL", "imageio", "yaml", "roma", "tqdm", "hooks"}
    assert modules_after("import easi3r", tmp_path) & heavy == set()


def test_scenes_and_settings_need_no_torch(tmp_path):
    program = "import easi3r; easi3r.Scene, easi3r.Motion, easi3r.PointCloud, easi3r.Settings; import easi3r.cli"
    assert modules_after(program, tmp_path) & {"torch", "roma", "hooks"} == set()


def test_hooks_imports_torch_alone(tmp_path):
    done = run_python("import torch; before = {*sys.modules}; import hooks; print({*sys.modules} - before)", tmp_path)
    assert {name.partition(".")[0] for name in ast.literal_eval(done.stdout)} == {"hooks"}
    for file in Path(hooks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert outside <= {"torch", "hooks"}, file


def test_every_public_name_resolves_and_is_listed():
    for name in easi3r.__all__:
        assert getattr(easi3r, name) is not None and name in dir(easi3r)
    assert {"Easi3R", "Motion", "Scene", "Settings"} <= set(easi3r.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", easi3r.__version__)
    with pytest.raises(AttributeError, match="module 'easi3r' has no attribute 'Easy3R'"):
        easi3r.Easy3R  # noqa: B018


# --- another hooks


@pytest.mark.parametrize("name", ["hooks.py", "hooks/__init__.py"])
def test_a_file_that_shadows_our_hooks_is_refused_with_both_paths(tmp_path, name):
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("print('my own hooks')")
    done = run_python("import easi3r", tmp_path)
    assert done.returncode == 1 and done.stdout == ""  # it was not even run
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: easi3r needs its own package 'hooks'")
    assert str(ROOT / "hooks" / "__init__.py") in message and str(foreign) in message and "rename that file" in message


def test_a_folder_called_hooks_without_python_in_it_is_harmless(tmp_path):
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "pre-commit").touch()
    done = run_python("import easi3r; print(easi3r.__version__)", tmp_path)
    assert (done.stdout.strip(), done.stderr) == (easi3r.__version__, "")


def test_an_installation_without_our_hooks_says_so(tmp_path):
    shutil.copytree(ROOT / "easi3r", tmp_path / "site" / "easi3r", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_python(
        "sys.path = [p for p in sys.path if not __import__('os').path.isdir(p + '/hooks')]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\nimport easi3r",
        tmp_path,
        path=tmp_path / "site",
    )
    message = done.stderr.splitlines()[-1]
    assert str(tmp_path / "site" / "hooks" / "__init__.py") in message and "no such package" in message
    assert "install easi3r again" in message


# --- the wheel


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    """A folder with what a wheel holds that was built from a copy of this checkout, without the network."""
    if not (ROOT / "setup.cfg").is_file():
        pytest.skip("easi3r is installed: there is no checkout to build a wheel from")
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building a wheel without the network needs pip and setuptools in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "notebooks")
    shutil.copytree(ROOT, folder / "checkout", ignore=unwanted)
    for name in ("tests", "evaluation", "configs"):  # so that they could get in
        (folder / "checkout" / name).mkdir(exist_ok=True)
        (folder / "checkout" / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "-w", folder / "dist", folder / "checkout"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "dist").iterdir()
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def wheel(unpacked_wheel):
    """Name -> content of the wheel's files."""
    files = (path for path in unpacked_wheel.rglob("*") if path.is_file())
    return {path.relative_to(unpacked_wheel).as_posix(): path.read_text("utf-8", "replace") for path in files}


def test_the_wheel_holds_every_module_of_easi3r_and_hooks_and_nothing_else(wheel):
    modules = {str(path.relative_to(ROOT)) for name in ("easi3r", "hooks") for path in (ROOT / name).rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == modules
    folders = {name.partition("/")[0] for name in wheel}
    assert folders == {"easi3r", "hooks", f"easi3r-{easi3r.__version__}.dist-info"}


def test_the_wheel_is_typed_and_has_the_command(wheel):
    assert "easi3r/py.typed" in wheel and "hooks/py.typed" in wheel
    info = f"easi3r-{easi3r.__version__}.dist-info"
    assert "easi3r = easi3r.cli:main" in wheel[f"{info}/entry_points.txt"]
    assert f"Version: {easi3r.__version__}\n" in wheel[f"{info}/METADATA"]
    assert {"Provides-Extra: hub", "Provides-Extra: video"} <= set(wheel[f"{info}/METADATA"].splitlines())


def test_the_wheel_brings_the_bundled_checkpoint_and_its_card(unpacked_wheel, wheel, tmp_path):
    assert "Model card" in wheel["easi3r/demo/README.md"]
    program = (
        "import easi3r; model = easi3r.Easi3R.from_pretrained('demo'); print(easi3r.__file__, model.checkpoint.licence)"
    )
    done = run_python(program, tmp_path, path=unpacked_wheel)
    assert done.returncode == 0, done.stderr
    assert str(unpacked_wheel) in done.stdout and "Apache-2.0" in done.stdout
