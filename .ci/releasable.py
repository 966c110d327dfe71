"""Fail unless the tree can be released: `python .ci/releasable.py v0.2.0 https://github.com/OWNER/fastrms`.

The tag must be the version, changelog and CITATION.cff must have it, and pyproject.toml must have the address.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def problems(tag, repository, root=ROOT):
    """Return the reasons against a release, an empty list if there is none."""

    def read(name):
        return (root / name).read_text(encoding="utf-8")

    version = re.search(r'^__version__ = "(.+)"$', read("fastrms/__init__.py"), re.M)[1]
    address = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and fastrms.__version__ is {version}")
    if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", read("docs/changelog.md"), re.M):
        found.append(f"docs/changelog.md has no heading '## {version} - YYYY-MM-DD'")
    if f"\nversion: {version}\n" not in read(".github/CITATION.cff"):
        found.append(f".github/CITATION.cff has another version than {version}")
    if address != repository:
        found.append(f"pyproject.toml has the repository {address!r}, and this one is {repository!r}")
    return found


if __name__ == "__main__":
    found = problems(*sys.argv[1:])
    print("\n".join(found) or "releasable")
    sys.exit(bool(found))
