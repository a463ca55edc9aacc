"""The site builds without a network and without warnings, has every public name, and its examples are correct."""

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import ssmkit
import ssmkit.streaming
from test_structure import PUBLIC

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted(path.stem for path in (DOCS / "tutorials").glob("[0-9]_*.py"))

# The first test waits for the site, which runs the tutorials; parallel processes of pytest do not build it twice.
pytestmark = [pytest.mark.timeout(700), pytest.mark.xdist_group("docs")]


def build(builder: str, folder: Path) -> Path:
    """Builds a copy, so that every tutorial runs, and no build sees the pages of another one."""
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("_build", "gallery"))
    for name in ("examples", "CHANGELOG.md"):  # the data of the tutorials, and what a page includes
        (folder / name).symlink_to(DOCS.parent / name)
    out = folder / builder
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", builder, folder / "docs", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("html", tmp_path_factory.mktemp("site"))


def test_pages_need_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        assert not [tag for tag in tags if re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"""(?:@import|url\()\s*["']?(?:https?:)?//""", style.read_text()), style


def test_pages_with_formulas_load_the_local_mathjax(site):
    page = (site / "mathematics.html").read_text()
    sources = re.findall(r'<script\b[^>]*\bsrc="([^"?]*mathjax[^"?]*)', page)
    assert sources
    assert all((site / source).is_file() for source in sources)
    fonts = list((site / "_static" / "mathjax" / "output" / "chtml" / "fonts").rglob("*.woff"))
    assert fonts


def test_every_public_name_has_an_entry(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    names = {f"{module.__name__}.{name}" for module in PUBLIC for name in module.__all__}
    assert names <= entries, sorted(names - entries)


def test_every_program_in_the_folder_is_a_tutorial():
    assert {path.stem for path in (DOCS / "tutorials").glob("*.py")} == {*TUTORIALS, "common"}


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_has_a_page_with_its_results(site, name):
    page = (site / "gallery" / f"{name}.html").read_text()
    assert "sphx-glr-script-out" in page
    assert f"sphx_glr_{name}_001_2_00x.png" in page
    assert "Traceback" not in page
    assert f'href="{name}.html"' in (site / "gallery" / "index.html").read_text()


def test_the_changelog_is_a_page_with_its_headings_links_and_code(site):
    page = (site / "changelog.html").read_text()
    assert "<h1>Changelog" in page
    assert "<h3>Numerics" in page
    assert 'href="https://semver.org">SemVer</a>' in page
    assert "x_k = a_k x_(k-1)" in page
    assert "## " not in page


def test_examples_are_right(tmp_path):
    build("doctest", tmp_path)


def _sentences() -> list[tuple[str, str]]:
    rows = re.findall(r"^   \* - ``(.+)``\n     - (.+(?:\n       .+)*)", (DOCS / "errors.rst").read_text(), re.M)
    return [(call, " ".join(answer.split()).replace("\\*", "*")) for call, answer in rows]


@pytest.mark.parametrize(("call", "answer"), _sentences(), ids=[call for call, _ in _sentences()])
def test_wrong_input_raises_the_error_in_the_table(call, answer):
    # The names that the tables use are set up by the last examples before them.
    head = (DOCS / "errors.rst").read_text().partition(".. list-table::")[0].partition("They use")[2]
    names = {"ssmkit": ssmkit, "torch": torch, "nn": torch.nn}
    exec("\n".join(re.findall(r"^>>> (.*)", head, re.M)), names)
    kind, _, message = answer.partition(": ")
    with pytest.raises({"TypeError": TypeError, "ValueError": ValueError}[kind]) as caught:
        eval(call, names)
    assert str(caught.value) == message


def test_the_tables_of_errors_are_read():
    assert len(_sentences()) > 40
