"""Settings of Sphinx: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pictures  # noqa: E402 - found only now

import fastrms  # noqa: E402

project = "fastrms"
version = release = fastrms.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["_build"]

# Links of pages are those that also work where the files lie: page.md#heading.
myst_heading_anchors = 3
# Equations: $v$ in a sentence, and ```{math} or $$ for a line of its own. ::: opens a directive that holds Markdown.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_dmath_allow_space = False  # "$HOME and $PATH" is no equation

# A page for each name that api.md lists; for a module, one with all names of its __all__.
templates_path = ["_templates"]
default_role = "autolink"  # `name` in a docstring is a link where there is such a name
autodoc_typehints = "none"  # docstrings say more
autodoc_member_order = "groupwise"
# What classes have from Python, and an adapter from its framework, is documented there.
autodoc_default_options = {"members": True, "inherited-members": "Exception, MutableMapping, Optimizer"}
# So that the pages can be built without the largest of what adapters import.
autodoc_mock_imports = [name for name in ("torch",) if find_spec(name) is None]
numpydoc_show_class_members = False  # autodoc does, with all of their text

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = f"fastrms {release}"
html_show_copyright = False


def titles(app: Any, page: str, source: list[str]) -> None:
    """Let links to pages, which are named by their files for readers of the files, have the titles of the pages."""
    source[0] = re.sub(r"\[[\w-]+\.md\]\(", "[](", source[0])


def setup(app: Any) -> None:
    """Draw the pictures ahead of the pages that show them."""
    app.connect("builder-inited", lambda app: pictures.draw_all(HERE / "_pictures"))
    app.connect("source-read", titles)
