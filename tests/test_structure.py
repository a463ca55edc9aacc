"""The order of files and imports, quiet imports, and documentation of all public names."""

import ast
import dataclasses
import doctest
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssmkit
import ssmkit.streaming

ROOT = Path(ssmkit.__file__).parent

# A file or folder imports only from those above it in this list. Inside a folder the order is free, but imports must
# not be circular.
ORDER = [
    "_checks",
    "hippo",
    "initializers",
    "ops",
    "systems",
    "states",
    "layers",
    "sequences",
    "optim",
    "stepping",
    "testing",
    "convert",
    "streaming",
    "",
]
NAMES = ["", *(m.name.removeprefix("ssmkit.") for m in pkgutil.walk_packages(ssmkit.__path__, "ssmkit."))]
MODULES = [importlib.import_module(f"ssmkit.{name}".rstrip(".")) for name in NAMES]
FOLDERS = sorted(name for name, module in zip(NAMES, MODULES, strict=True) if hasattr(module, "__path__"))
PUBLIC = [
    ssmkit,
    ssmkit.convert,
    ssmkit.hippo,
    ssmkit.initializers,
    ssmkit.ops,
    ssmkit.sequences,
    ssmkit.states,
    ssmkit.streaming,
    ssmkit.systems,
    ssmkit.testing,
]


def source(name):
    return Path(MODULES[NAMES.index(name)].__file__)


def imported(name):
    """The modules of ssmkit that a module imports, and the packages outside of it."""
    package = name.split(".") if name in FOLDERS else name.split(".")[:-1]
    package = ["ssmkit", *(part for part in package if part)]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source(name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part][1:]
            for alias in node.names:
                target = ".".join([*base, alias.name])
                inside.add(target if target in NAMES else ".".join(base))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            outside |= {n.split(".")[0] for n in names}
    return inside, outside


def member(name, folder):
    """The file or folder directly inside a folder to which a module belongs; None if it is not inside."""
    if folder and name != folder and not name.startswith(f"{folder}."):
        return None
    rest = name[len(folder) :].lstrip(".").split(".")[0]
    return f"{folder}.{rest}".strip(".") if rest else folder


def test_every_file_and_folder_has_its_place():
    assert {member(name, "") for name in NAMES} == set(ORDER)


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_one_way(name):
    inside, outside = imported(name)
    for target in inside:
        here, there = member(name, ""), member(target, "")
        assert here == there or ORDER.index(there) < ORDER.index(here), f"{name} imports {target}"
    known = {*sys.stdlib_module_names, "torch", "einops", "opt_einsum", "numpy"}
    known |= {"numba", "llvmlite"} if name.startswith("streaming") else set()
    assert outside <= known


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_inside_a_folder_are_not_circular(folder):
    graph = {}
    for name in NAMES:
        if (here := member(name, folder)) is not None:
            found = {member(target, folder) for target in imported(name)[0]}
            graph.setdefault(here, set()).update(found - {None, here})
    list(graphlib.TopologicalSorter(graph).static_order())


def test_compiled_code_depends_only_on_its_folder():
    """Its sources are the key of numba's cache."""
    modules = [name for name in NAMES if name.startswith("streaming.kernels")]
    assert len(modules) > 5
    for name in modules:
        assert all(target.startswith("streaming.kernels") for target in imported(name)[0]), name


# Hooks of torch modules, and methods of named tuples.
FOREIGN = {"_forward_hooks", "_forward_pre_hooks", "_replace", "_fields"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("streaming") or name == "stepping"])
def test_no_file_uses_private_names_of_another(name):
    """No file uses a name with an underscore that it does not define itself."""
    tree = ast.parse(source(name).read_text())
    own, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(node.ctx, ast.Store)
            (own if mine else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and name:
            used |= {alias.name for alias in node.names} - {"_checks"}
    private = {attribute for attribute in used if attribute.startswith("_") and not attribute.startswith("__")}
    assert not private - own - FOREIGN, name


@pytest.mark.parametrize("name", NAMES)
def test_files_stay_short(name):
    assert len(source(name).read_text().splitlines()) <= 450


def test_importing_is_quiet_and_pulls_in_nothing_optional():
    code = (
        "import sys, logging, torch; logging.basicConfig(level=0); before = set(sys.modules); import ssmkit; "
        "extra = {'scipy', 'matplotlib', 'soundfile', 'numba', 'pytest', 'hypothesis', 'tqdm', 'tyro', 'sphinx'}; "
        "print(sorted(extra & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples_in_docstrings_run(module):
    names = {**vars(module), "torch": torch, "ssmkit": ssmkit}
    torch.manual_seed(0)
    failed = 0
    for test in doctest.DocTestFinder().find(module, globs=names):
        failed += doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(test).failed
    assert not failed


def test_the_readme_example_runs():
    text = (ROOT.parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})


def public_objects():
    for module in PUBLIC:
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield f"{module.__name__}.{name}", getattr(module, name)


@pytest.mark.parametrize(("name", "thing"), list(public_objects()), ids=lambda x: x if isinstance(x, str) else "")
def test_everything_public_is_documented(name, thing):
    """A docstring with an example for every public class and function, except naive versions and fields of values."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    doc = inspect.getdoc(thing) or ""
    assert len(doc) > 30, name
    naive = name.rsplit(".", 1)[1].startswith("naive_")
    value = inspect.isclass(thing) and (issubclass(thing, tuple) or dataclasses.is_dataclass(thing))
    if not naive and not value:
        assert ">>>" in doc, name


def test_names_are_sorted_and_exist():
    for module in MODULES:
        names = getattr(module, "__all__", None)
        assert names is not None, module.__name__
        assert len(set(names)) == len(names)
        assert all(hasattr(module, name) for name in names), module.__name__
