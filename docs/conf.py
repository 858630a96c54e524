"""Sphinx's configuration: the Markdown pages as they stand, with furo. Built by `make docs`, warnings as errors."""

from importlib.metadata import version as version_of

project = "lit_sparse"
release = version = version_of("lit-sparse")
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"lit_sparse {version}"
exclude_patterns = ["_build"]
