"""Sphinx's settings for the teaching document; `build.py` lays out what is rendered."""

project = "Factorized convolutional networks in Keras"
author = "the authors of fcnn_utils"
copyright = "the authors; MIT licence"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
nb_execution_mode = "off"  # what is committed is rendered
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # as docstrings use `it`

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["course.css"]
html_show_sphinx = False
html_copy_source = False
