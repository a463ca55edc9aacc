"""Changes the library in one place at a time, runs the tests of the file, and prints the changes that no test notices.

    python tests/mutation.py --sample 100 --seed 1
    python tests/mutation.py ops/scan.py systems/dplr.py --sample 0

A comparison, an operator or a constant becomes another one; a guard, a call or a `not` is left out; two arguments or
two branches are swapped. A change that survives needs a new test, or an entry with the reason in
`mutation_survivors.toml`, and is then not tried again. Works in a copy of the tree, in one process at a time. Needs
Python 3.11 and the packages of `make test`.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

# Loaded here once: every run of the tests is a fork of this process. The library itself must not be loaded.
import pytest
import tomllib
import torch  # noqa: F401
from torch import _dynamo  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = ROOT / "tests/mutation_survivors.toml"

LAWS = ["tests/test_laws.py", "--deselect=tests/test_laws.py::test_float32_holds_over_long_sequences"]
LAYERS = ["tests/test_layers.py", *LAWS]
ENGINE = ["tests/test_kernels.py", "tests/test_engine.py", "tests/test_streaming.py"]

# The tests of a file, the quick ones first. Those of a folder are for files without an entry.
TESTS = {
    "_checks.py": [
        "tests/test_initializers.py",
        "tests/test_ops.py",
        "tests/test_containers.py",
        "tests/test_layers.py",
    ],
    "hippo.py": ["tests/test_hippo.py", "tests/test_initializers.py"],
    "initializers.py": ["tests/test_initializers.py", "tests/test_layers.py"],
    "ops/selective.py": ["tests/test_selective.py"],
    "ops/blocks.py": ["tests/test_blocks.py", "tests/test_timed.py"],
    "ops/ssd.py": ["tests/test_ssd.py"],
    "ops/": ["tests/test_ops.py", "tests/test_systems.py", "tests/test_numerics.py"],
    "systems/base.py": ["tests/test_parts.py", "tests/test_own_layer.py", "tests/test_systems.py", *LAWS],
    "systems/shared.py": ["tests/test_shared.py", "tests/test_own_layer.py", "tests/test_parts.py", *LAWS],
    "systems/timed.py": ["tests/test_blocks.py", "tests/test_timed.py"],
    "systems/taps.py": ["tests/test_shared.py", *LAWS],
    "systems/words.py": ENGINE,
    "systems/selective.py": ["tests/test_selective.py", *LAWS],
    "systems/heads.py": ["tests/test_ssd.py", *LAWS],
    "systems/two_sided.py": ["tests/test_shared.py", "tests/test_layers.py"],
    "systems/": ["tests/test_systems.py", "tests/test_layers.py", "tests/test_numerics.py", *LAWS],
    "states.py": ["tests/test_states.py", "tests/test_phases.py"],
    "layers/container.py": ["tests/test_containers.py", "tests/test_forward_only.py", *LAWS],
    "layers/chain.py": ["tests/test_containers.py", "tests/test_forward_only.py", *LAWS],
    "layers/branches.py": ["tests/test_branches.py", "tests/test_forward_only.py", *LAWS],
    "layers/pointwise.py": ["tests/test_containers.py", *LAWS],
    "layers/learned_start.py": ["tests/test_learned_start.py", *LAWS],
    "layers/dropout.py": ["tests/test_containers.py", *LAWS],
    "layers/base.py": ["tests/test_forward_only.py", *LAWS],
    "layers/pooling.py": ["tests/test_pooling.py", "tests/test_phases.py", *LAWS],
    "layers/statespace.py": ["tests/test_own_layer.py", "tests/test_parts.py", *LAYERS],
    "layers/lru.py": ["tests/test_shared.py", *LAWS],
    "layers/s5.py": ["tests/test_shared.py", *LAWS],
    "layers/short_conv.py": ["tests/test_shared.py", *LAWS],
    "layers/mamba.py": ["tests/test_selective.py", *LAWS],
    "layers/mamba2.py": ["tests/test_ssd.py", *LAWS],
    "layers/block.py": ["tests/test_containers.py", *LAWS],
    "layers/": LAYERS,
    "optim.py": ["tests/test_optim.py"],
    "stepping.py": ["tests/test_stepping.py"],
    "streaming/kernels/compiling.py": [*ENGINE, "tests/test_cache.py"],
    "testing/modes.py": ["tests/test_testing.py"],
    "testing/": ["tests/test_testing.py", "tests/test_batch_laws.py"],
    "sequences/": ["tests/test_sequences.py"],
    "convert/": ["tests/test_convert.py"],
    "streaming/": ENGINE,
}

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changed(node):
    """The replacements of a node."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield new
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        new.op = OPERATORS[type(node.op)]()
        yield new
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield new.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        new.value = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else 1.001 * value
        yield new
    if isinstance(node, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield new
    if isinstance(node, ast.If):
        new.test = ast.Constant(False)
        yield new
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    # The order of the arguments of max and min does not matter.
    swaps = isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func) not in ("max", "min")
    if swaps and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        new.args[:2] = new.args[1::-1]
        yield new


# Annotations and decorators do not compute, and error texts are not changed.
PASSED_OVER = {"annotation", "returns", "decorator_list", "exc"}


def places(node, way=()):
    """The paths from the root of a tree to all nodes that may be changed."""
    for name, value in ast.iter_fields(node):
        if name in PASSED_OVER or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.JoinedStr) or not isinstance(child, ast.AST):
                continue
            here = (*way, (name, index))
            for number, _ in enumerate(changed(child)):
                yield here, number, child
            yield from places(child, here)


def replaced(tree, way, number):
    """The code with a change, and a description of the change."""
    tree = copy.deepcopy(tree)
    parent = tree
    for name, index in way[:-1]:
        parent = getattr(parent, name) if index is None else getattr(parent, name)[index]
    name, index = way[-1]
    old = getattr(parent, name) if index is None else getattr(parent, name)[index]
    new = list(changed(old))[number]
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new
    words = " -> ".join(ast.unparse(ast.fix_missing_locations(x)).splitlines()[0] for x in (old, new))
    return ast.unparse(ast.fix_missing_locations(tree)), words


def status(folder, arguments, limit, **environment):
    """Exit status of the tests in a fork of this process; None if they take longer than the limit."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        paths = [str(folder / "src"), str(folder / "tests")]
        sys.path[:0] = paths
        os.environ.update({"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", **environment})
        sys.dont_write_bytecode = True
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments])))
    until = time.monotonic() + limit
    while time.monotonic() < until:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def tests_of(file):
    return TESTS[file if file in TESTS else file.split("/")[0] + "/"]


def survives(folder, file, limit):
    """Whether the tests of a file pass."""
    # A change that is noticed without the compiler need not be compiled.
    if file.startswith("streaming/") and status(folder, ["tests/test_kernels.py"], limit, NUMBA_DISABLE_JIT="1"):
        return False
    if not file.startswith("streaming/kernels/"):
        return status(folder, tests_of(file), limit, NUMBA_CACHE_DIR=str(folder / "numba")) == 0
    with tempfile.TemporaryDirectory() as cache:
        return status(folder, tests_of(file), limit, NUMBA_CACHE_DIR=cache) == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="below src/ssmkit; all by default")
    parser.add_argument("--sample", type=int, default=100, help="how many changes to try; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which tests count as failed")
    options = parser.parse_args()
    source = ROOT / "src/ssmkit"
    files = options.files or [
        str(p.relative_to(source)) for p in sorted(source.rglob("*.py")) if p.name != "__init__.py"
    ]
    known = tomllib.loads(SURVIVORS.read_text())["survivor"]
    explained = {(entry["file"], entry["line"], entry["change"]) for entry in known}
    every = [(file, *place) for file in files for place in places(ast.parse((source / file).read_text()))]
    random.Random(options.seed).shuffle(every)
    survivors, tried = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("src", "tests", "pyproject.toml"):
            copier = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copier(ROOT / part, folder / part)
        # Some tests read these files.
        (folder / "examples").symlink_to(ROOT / "examples")
        # First run the tests without a change, once per list of tests: if they fail, no change would survive.
        for file in {tuple(tests_of(file)): file for file, *_ in every[: options.sample or None]}.values():
            if not survives(folder, file, options.limit):
                sys.exit(f"The tests of {file} fail or take too long as they are.")
        for file, way, number, node in every:
            path = folder / "src/ssmkit" / file
            text = path.read_text()
            code, words = replaced(ast.parse(text), way, number)
            entry = (file, text.splitlines()[node.lineno - 1].strip(), words)
            if entry in explained or code == ast.unparse(ast.parse(text)):
                continue
            path.write_text(code)
            began = time.monotonic()
            if survives(folder, file, options.limit):
                survivors.append(entry)
                print(f"\n{file}:{node.lineno}: {words}\n    {entry[1]}", flush=True)
            path.write_text(text)
            tried += 1
            print(f"\r{tried} tried, {len(survivors)} survived, {time.monotonic() - began:.0f} s", end="", flush=True)
            if tried == options.sample:
                break
    print(f"\n{tried} changes of {len(every)}, {len(survivors)} not noticed, {len(explained)} explained")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
