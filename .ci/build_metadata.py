"""Complete the metadata that depends on the address of the repository: README's links and the project's URLs.

hatchling runs this hook in every build. `tool.hatch.metadata.hooks.custom` in pyproject.toml has the address. README's
links are relative, so that they work in a clone; a package index needs absolute links. hatch-fancy-pypi-readme can
replace links too, but needs the address a second time, and cannot build without one.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"""(?P<start>\]\(|\b(?:src|srcset|href)=")(?P<target>(?![a-z]+:|\#)[^)\s"]+)""")
PICTURES = {".gif", ".jpg", ".png", ".svg", ".webp"}


def absolute(text, repository, ref):
    """Return Markdown whose relative links point to the files of the repository at a tag or branch."""

    def address(link):
        path = link["target"].split("#")[0]
        kind = "raw" if Path(path).suffix in PICTURES else "blob"
        return f"{link['start']}{repository}/{kind}/{ref}/{link['target']}"

    return LINK.sub(address, text)


class Hook(MetadataHookInterface):
    """The hook that hatchling loads from this file."""

    def update(self, metadata):
        """Set `readme` and `urls`. Without an address README keeps its relative links, and there are no URLs."""
        repository = self.config["repository"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["urls"] = {}
        if repository:
            text = absolute(text, repository, f"v{metadata['version']}")
            metadata["urls"] = {
                "Repository": repository,
                "Documentation": f"{repository}/blob/main/docs/index.md",
                "Changelog": f"{repository}/blob/main/docs/changelog.md",
                "Issues": f"{repository}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
