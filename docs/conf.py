"""How Sphinx makes the site of the pages in this folder: ``make docs``.

``-D nb_execution_mode=off`` leaves the notebooks unexecuted, for a quick look.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import trtkern

project = "trtkern"
author = "the trtkern authors"
copyright = "the trtkern authors, MIT licence"
version = release = trtkern.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
    "extension",
]
exclude_patterns = ["_build", "_templates", "**/.ipynb_checkpoints"]

nitpicky = True  # a name in a page or docstring that leads nowhere is an error
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 6

# A cell that fails ends the build. What was executed is kept, so that only notebooks that changed run again.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).resolve().parent / "_build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True

html_theme = "furo"
html_title = f"trtkern {release}"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
# The picture of the landing page, once there is one, stands in docs/index.md as plain Markdown: ![...](landing.svg).
copybutton_exclude = ".linenos, .gp, .go"
