"""Sphinx's configuration: ``sphinx-build -W docs FOLDER``, with the package and its extra ``docs`` installed."""

import fastseg

project = "fastseg"
author = "the fastseg authors"
copyright = "the fastseg authors. Apache-2.0"
release = version = fastseg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # what docstrings write between backticks: a link where the reference has it, else code
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_use_ivar = True

html_theme = "pydata_sphinx_theme"
html_title = "fastseg"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
html_copy_source = False
