"""The house: imports go one way, importing is quiet, everything public is documented and runs."""

import ast
import doctest
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

# From the ground up: a file imports only from files above it in this list.
ORDER = [
    "_checks",
    "hippo",
    "initializers",
    "ops.complex",
    "ops.vandermonde",
    "ops.cauchy",
    "ops.krylov",
    "ops.conv",
    "ops.recurrence",
    "ops.scan",
    "ops",
    "systems.recurrence",
    "systems.dense",
    "systems.diagonal",
    "systems.dplr",
    "systems",
    "states",
    "layers.base",
    "layers.ssm",
    "layers.s4",
    "layers.s4d",
    "layers.pointwise",
    "layers.container",
    "layers.chain",
    "layers.branches",
    "layers.dropout",
    "layers.pooling",
    "layers.block",
    "layers",
    "optim",
    "stepping",
    "testing",
    "streaming.kernels",
    "streaming.packing",
    "streaming.program",
    "streaming.lowering",
    "streaming.engine",
    "streaming",
    "",
]
MODULES = [importlib.import_module(f"ssmkit.{name}".rstrip(".")) for name in ORDER]
PUBLIC = [
    ssmkit,
    ssmkit.hippo,
    ssmkit.initializers,
    ssmkit.ops,
    ssmkit.states,
    ssmkit.streaming,
    ssmkit.systems,
    ssmkit.testing,
]


def test_every_module_has_its_place():
    found = {m.name.removeprefix("ssmkit").lstrip(".") for m in pkgutil.walk_packages(ssmkit.__path__, "ssmkit.")}
    assert found | {""} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    path = ROOT / (name.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / name.replace(".", "/") / "__init__.py"
    package = ["ssmkit", *name.split(".")][: -1 if path.name != "__init__.py" else None]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                target = ".".join([*base, alias.name][1:])
                target = target if target in ORDER else ".".join(base[1:])
                assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            known = {*sys.stdlib_module_names, "torch", "einops", "opt_einsum", "numpy"}
            known |= {"numba", "llvmlite"} if name.startswith("streaming") else set()
            assert {n.split(".")[0] for n in names} <= known


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
    """A docstring with an example for every public class and function, but for twins and fields of values."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    doc = inspect.getdoc(thing) or ""
    assert len(doc) > 30, name
    twin = name.rsplit(".", 1)[1].startswith("naive_")
    value = inspect.isclass(thing) and issubclass(thing, tuple)
    if not twin and not value:
        assert ">>>" in doc, name


def test_names_are_sorted_and_exist():
    for module in MODULES:
        names = getattr(module, "__all__", None)
        assert names is not None, module.__name__
        assert len(set(names)) == len(names)
        assert all(hasattr(module, name) for name in names), module.__name__
