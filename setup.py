"""The description on PyPI: README.md with links into the repository, since relative ones lead nowhere there.

All else is in pyproject.toml. Variables of GitHub's workflows name the repository and its tag; without them, as in a
build of one's own, the texts of links stay and the links are left out.
"""

import os
import re
from pathlib import Path

from setuptools import setup

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def absolute(text: str, repository: str, ref: str) -> str:
    """Return Markdown with its relative links leading to `repository`, such as `owner/name`, at a tag or branch."""

    def replaced(link: re.Match[str]) -> str:
        image, name, path = link.groups()
        if not repository:
            return "" if image else name
        place = "https://raw.githubusercontent.com/{}/{}/{}" if image else "https://github.com/{}/blob/{}/{}"
        return f"{image}[{name}]({place.format(repository, ref, path)})"

    return RELATIVE.sub(replaced, text)


REPOSITORY = os.environ.get("GITHUB_REPOSITORY", "")
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")

setup(
    long_description=absolute(README, REPOSITORY, os.environ.get("GITHUB_REF_NAME", "HEAD")),
    long_description_content_type="text/markdown",
    project_urls={"Source": f"https://github.com/{REPOSITORY}"} if REPOSITORY else {},
)
