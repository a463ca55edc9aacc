"""The package as users get it: its files, the checks of the package index, and an installation without the sources."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A wheel and a source distribution."""
    folder = tmp_path_factory.mktemp("packages")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True, text=True
    )
    (wheel,), (sources,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sources


def test_the_wheel_holds_the_library_alone(packages):
    names = zipfile.ZipFile(packages[0]).namelist()
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/ssmkit").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "ssmkit/py.typed" in names
    assert {name.partition("/")[0] for name in names if name not in modules} == {"ssmkit", names[-1].partition("/")[0]}


def test_the_source_distribution_is_small_and_complete(packages):
    assert packages[1].stat().st_size <= 1 << 20
    with tarfile.open(packages[1]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {
        "CITATION.cff",
        "LICENSE",
        "README.md",
        "tests/family.py",
        "docs/conf.py",
        "examples/sashimi_youtubemix.py",
    }
    assert wanted <= names


def test_the_package_index_accepts_both(packages):
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *packages], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_of_the_readme_runs_with_the_installed_wheel(packages, tmp_path):
    """In an environment of its own, which finds the dependencies here, but not these sources."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip())
    # Such a file adds a folder, but does not read the files in it that add the sources of an editable installation.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    zipfile.ZipFile(packages[0]).extractall(site)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    code = "\n".join([*blocks, "print(ssmkit.__file__)"])
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(site)


def test_the_citation_has_the_version():
    import ssmkit

    assert f"version: {ssmkit.__version__}\n" in (ROOT / "CITATION.cff").read_text()
