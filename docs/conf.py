"""How Sphinx makes the site of the pages in this folder: ``make docs``."""

from __future__ import annotations

import trtkern

project = "trtkern"
author = "the trtkern authors"
copyright = "the trtkern authors, MIT licence"
version = release = trtkern.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True  # a name in a page or docstring that leads nowhere is an error

html_theme = "furo"
html_title = f"trtkern {release}"
html_static_path: list[str] = []

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"
