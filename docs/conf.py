"""Settings of Sphinx: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

import sys
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

# A page for each name that api.md lists; for a module, one with all names of its __all__.
templates_path = ["_templates"]
default_role = "autolink"  # `name` in a docstring is a link where there is such a name
autodoc_typehints = "none"  # docstrings say more
autodoc_member_order = "groupwise"
# What errors and mappings have from Python is documented there.
autodoc_default_options = {"members": True, "inherited-members": "Exception, MutableMapping"}
numpydoc_show_class_members = False  # autodoc does, with all of their text

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = f"fastrms {release}"
html_show_copyright = False


def setup(app: Any) -> None:
    """Draw the pictures ahead of the pages that show them."""
    app.connect("builder-inited", lambda app: pictures.draw_all(HERE / "_pictures"))
