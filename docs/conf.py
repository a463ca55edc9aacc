"""How the documentation site is built.

    sphinx-build -W -n -b html docs docs/_build/html
    sphinx-build -W -n -b doctest docs docs/_build/doctest

The first runs the programs in `tutorials/` and writes their pages to `gallery/`, which git ignores. It does not run a
program again that has not changed, until that folder is deleted.

Both run without a network: MathJax is copied into the site by the package sphinx-mathjax-offline, and links to other
projects are resolved from small inventories that hold only the names used here. To add a name, add its line to
`_inventories/NAME.txt`, then

    pip install sphobjinv
    sphobjinv convert zlib --overwrite docs/_inventories/NAME.txt docs/_inventories/NAME.inv
"""

from __future__ import annotations

import doctest
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.inspect import stringify_signature

import ssmkit

sys.path.insert(0, str(Path(__file__).parent / "tutorials"))  # for `common`, which the tutorials share

project = "ssmkit"
author = "the ssmkit authors"
version = release = ssmkit.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",  # the name of its module, hyphens and all
]
exclude_patterns = ["_build", "tutorials"]  # the pages of the tutorials are in gallery/
nitpicky = True
default_role = "code"  # docstrings write arguments as `u`
smartquotes_action = "D"  # dashes alone: quotes in messages are shown as they are

html_theme = "furo"
html_title = f"ssmkit {release}"
html_static_path = ["_static"]
html_css_files = ["ssmkit.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # `source_signature` below writes them
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes", "Units"]

# Re and Im in roman letters, instead of Fraktur.
mathjax3_config = {"tex": {"macros": {"Re": r"\operatorname{Re}", "Im": r"\operatorname{Im}"}}}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/\d_\w+\.py$",  # those that are run: all
    "ignore_pattern": r"common\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": ("_repr_html_",),  # players, and not what the last call of a plot returns
    "reset_modules": ("matplotlib", "common.reset_figures"),
    "image_srcset": ["2x"],
    "thumbnail_size": (400, 240),
    "notebook_extensions": [],
    "download_all_examples": False,
    "write_computation_times": False,
    "min_reported_time": 3600,
    "show_signature": False,
}

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "_inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "_inventories/torch.inv"),
    "numpy": ("https://numpy.org/doc/stable", "_inventories/numpy.inv"),
}

# Messages are compared in full: no ELLIPSIS and no IGNORE_EXCEPTION_DETAIL, unless an example asks for it.
doctest_default_flags = doctest.DONT_ACCEPT_TRUE_FOR_1
# Examples of a docstring use the names of their own module.
doctest_global_setup = """
import numpy as np
import torch
import ssmkit
from torch import nn
from ssmkit.convert import *
from ssmkit.hippo import *
from ssmkit.initializers import *
from ssmkit.ops import *
from ssmkit.sequences import *
from ssmkit.states import *
from ssmkit.systems import *
from ssmkit.testing import *
torch.manual_seed(0)
"""

# The entries on this site for the annotations in the source.
_NAMES = {
    "Any": "typing.Any",
    "Callable": "collections.abc.Callable",
    "Complex": "numpy.typing.NDArray",
    "hippo.Complex": "numpy.typing.NDArray",
    "Discretization": "ssmkit.systems.zoh",  # a function like it
    "Init": "ssmkit.initializers.Init",
    "Iterable": "collections.abc.Iterable",
    "Lengths": "ssmkit.sequences.forward_padded",  # which explains them
    "Measure": "ssmkit.hippo.legs",  # a function like it
    "PerFeature": "ssmkit.systems.DiscreteDPLR",  # one of its kinds
    "Real": "numpy.typing.NDArray",
    "StepCoefficients": "ssmkit.systems.DiscreteDPLR.step",  # what it is for
    "Sequence": "collections.abc.Sequence",
    "State": "ssmkit.states.State",
    "System": "ssmkit.SequenceLayer.system",  # what it returns
    "Tensor": "torch.Tensor",
    "Vector": "ssmkit.systems.Words",  # which explains it
    "_T": "typing.TypeVar",
    "nn.Module": "torch.nn.Module",
    "npt.ArrayLike": "numpy.typing.ArrayLike",
}
for _module in (ssmkit, ssmkit.convert, ssmkit.hippo, ssmkit.initializers, ssmkit.systems):
    for _name in _module.__all__:
        if inspect.isclass(getattr(_module, _name)):
            _NAMES.setdefault(_name, f"{_module.__name__}.{_name}")


def source_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Signatures with the annotations of the source: evaluated, aliases such as State would fill several lines."""
    if what not in ("class", "function", "method") or signature is None:
        return None
    sig = inspect.signature(obj)
    if what == "method":
        sig = sig.replace(parameters=list(sig.parameters.values())[1:])
    if what == "class":
        sig = sig.replace(return_annotation=inspect.Signature.empty)
        if "kwargs" in sig.parameters:  # nothing in ssmkit takes them: the class inherits __init__ from torch
            return "", None
    arguments, _, result = stringify_signature(sig).partition(" -> ")
    return arguments, result or None


def resolve_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement) -> Any:
    """Links the names in those annotations."""
    target = _NAMES.get(node["reftarget"])
    if node.get("refdomain") != "py" or target is None:
        return None
    node["reftarget"], node["reftype"] = target, "obj"
    # intersphinx resolves the full names that are not of this site.
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def changelog_as_rst(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Headings, links and underscores of CHANGELOG.md in reStructuredText; lists, code and bold text are the same."""
    if path.name != "CHANGELOG.md":
        return
    text = "`".join(part if i % 2 else part.replace("_", r"\_") for i, part in enumerate(content[0].split("`")))
    text = re.sub(r"^(#+) (.*)$", lambda m: f"{m[2]}\n{'=-~'[len(m[1]) - 1] * len(m[2])}", text, flags=re.M)
    content[0] = re.sub(r"\[([^]]+)\]\((http[^)]+)\)", r"`\1 <\2>`__", text)


def run_tutorials_for_pages_alone(app: Sphinx) -> None:
    """The builder of doctests needs the pages of the tutorials, but not their results."""
    if app.builder.format != "html":
        app.config.plot_gallery = False


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", run_tutorials_for_pages_alone, priority=5)  # the gallery reads it at 10
    app.connect("include-read", changelog_as_rst)
    app.connect("autodoc-process-signature", source_signature)
    app.connect("missing-reference", resolve_short_name, priority=400)
