"""Settings of Sphinx: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

import re
import sys
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from numpydoc.xref import DEFAULT_LINKS
from sphinx.ext.autodoc.mock import ismock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pictures  # noqa: E402 - found only now

import fastrms  # noqa: E402

project = "fastrms"
version = release = fastrms.__version__
extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples", "gallery/index.rst"]

# Links of pages are those that also work where the files lie: page.md#heading.
myst_heading_anchors = 3
# Equations: $v$ in a sentence, and ```{math} or $$ for a line of its own. ::: opens a directive that holds Markdown.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_dmath_allow_space = False  # "$HOME and $PATH" is no equation

# A page for each name that api.md lists; for a module, one with all names of its __all__.
templates_path = ["_templates"]
default_role = "autolink"  # `name` in a docstring is a link where there is such a name
autodoc_typehints = "none"  # docstrings say more
autodoc_use_type_comments = False
autodoc_member_order = "groupwise"
# What classes have from Python, and an adapter from its framework, is documented there.
autodoc_default_options = {"members": True, "inherited-members": "Exception, MutableMapping, Optimizer"}
# The extra `docs` installs neither torch nor mpi4py.
autodoc_mock_imports = [name for name in ("torch",) if find_spec(name) is None]
if find_spec("mpi4py") is None:
    sys.modules["mpi4py"] = MagicMock()  # autodoc's own mocks have no `|`, which annotations use
numpydoc_show_class_members = False  # autodoc does, with all of their text

# Links to the documentation of other projects. Without a network, the second place is read, which has no names: then
# these links are plain text, and the build has no warning.
intersphinx_timeout = 5
intersphinx_mapping = {
    name: (address, (None, "offline.inv"))
    for name, address in {
        "python": "https://docs.python.org/3",
        "numpy": "https://numpy.org/doc/stable",
        "numba": "https://numba.readthedocs.io/en/stable",
        "scipy": "https://docs.scipy.org/doc/scipy",
        "torch": "https://docs.pytorch.org/docs/stable",
        "mpi4py": "https://mpi4py.readthedocs.io/en/stable",
        "matplotlib": "https://matplotlib.org/stable",
        "sklearn": "https://scikit-learn.org/stable",
    }.items()
}
# In types of docstrings, these words are links. numpydoc has others, which would be warnings without a network.
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {word: word for word in DEFAULT_LINKS} | {
    word: f":class:`{word} <{name}>`"
    for word, name in {
        "ndarray": "numpy.ndarray",
        "dtype": "numpy.dtype",
        "path-like": "os.PathLike",
        "matplotlib.axes.Axes": "matplotlib.axes.Axes",
        "matplotlib.figure.Figure": "matplotlib.figure.Figure",
        "mpi4py.MPI.Intracomm": "mpi4py.MPI.Intracomm",
        "FlatBuffer": "fastrms.FlatBuffer",
        "Layout": "fastrms.Layout",
        "RMSProp": "fastrms.RMSProp",
    }.items()
}

# The gallery: the build runs these programs. What others need, the extra `docs` does not install; they are shown.
RUN = [
    "autograd_nested",
    "data_and_grad",
    "logistic_regression",
    "neuralnetlib_digits",
    "pydynet_digits",
    "recurrent",
    "sklearn_mlp",
    "word2vec",
]
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": rf"[/\\]({'|'.join(RUN)})\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),  # programs print
    "inspect_global_variables": False,  # or each array is a link to ndarray
    "image_srcset": ["2x"],
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("fastrms",),  # pages of names link to the programs that use them
    "default_thumb_file": str(HERE / "_static" / "program.svg"),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}
warnings.filterwarnings("ignore", "Cupy is not installed", UserWarning)  # pydynet says so when it is imported

copybutton_exclude = ".linenos, .gp, .go"  # no prompts and no output
copybutton_selector = "div:not(.sphx-glr-script-out) > div.highlight > pre"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = f"fastrms {release}"
html_show_copyright = False
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
# pyproject.toml has the address of the repository. While it is empty, pages have no links to their source there.
HATCH = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
if repository := HATCH.get("metadata", {}).get("hooks", {}).get("custom", {}).get("repository"):
    html_theme_options = {"source_repository": repository, "source_branch": "main", "source_directory": "docs/"}


def links(app: Any, page: str, source: list[str]) -> None:
    """Adapt links between files: a page is named by its title, and a program of the gallery has a page."""
    source[0] = re.sub(r"\[[\w-]+\.md\]\(", "[](", source[0])
    source[0] = re.sub(r"\]\(examples/(\w+)\.py\)", r"](gallery/\1.rst)", source[0])


def links_of_docstrings(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Let the files of pages in docstrings be links to the pages."""
    lines[:] = [re.sub(r"``docs/([\w-]+)\.md``", r":doc:`/\1`", line) for line in lines]


def no_source_of_generated_pages(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out the links to the source in the repository, which has no such file."""
    if page.startswith(("api/", "gallery/")):
        context["page_source_suffix"] = ""


def unwrap_mocks(app: Any, function: Any, bound: bool) -> None:
    """Let autodoc read the signature of a function that wraps a function of a mocked module."""
    if ismock(getattr(function, "__wrapped__", None)):
        del function.__wrapped__


def setup(app: Any) -> None:
    """Draw the pictures before the pages that show them."""
    app.connect("builder-inited", lambda app: pictures.draw_all(HERE / "_pictures"))
    app.connect("source-read", links)
    app.connect("autodoc-process-docstring", links_of_docstrings)
    app.connect("autodoc-before-process-signature", unwrap_mocks)
    app.connect("html-page-context", no_source_of_generated_pages)
