"""Sphinx's settings for the teaching document; `build.py` lays out what is rendered."""

import ast
import itertools
import re
import textwrap

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
nb_render_markdown_format = "myst"  # tables and links in outputs, as in the text
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # as docstrings use `it`


def setup(app):
    app.connect("autodoc-process-docstring", _examples, priority=400)  # before napoleon


def _examples(app, what, name, obj, options, lines):
    """An indented block behind a blank line is code, a formula or a table, and stays as it is."""
    for number in range(len(lines) - 2, 0, -1):
        if lines[number - 1][:1].strip() and not lines[number] and lines[number + 1].startswith("    "):
            rest = itertools.takewhile(lambda line: not line[:1].strip(), lines[number + 1 :])
            lines[number:number] = ["", f".. code-block:: {_language(textwrap.dedent(chr(10).join(rest)))}"]
    lines[:] = [re.sub(r"\(\*(?=\w)", r"(\\*", line) for line in lines]  # a shape (*spatial, S, T) is no emphasis


def _language(block):
    try:
        ast.parse(block)
    except SyntaxError:
        return "text"
    return "python"


autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["course.css"]
html_show_sphinx = False
html_copy_source = False
