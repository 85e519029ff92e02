"""Sphinx makes the site from these pages and the docstrings: `make site`."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

from mdn_jax import __version__

project = "mdn-jax"
release = version = __version__
copyright = "the mdn-jax authors"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mdn-jax {version}"
html_theme_options = {"navigation_with_keys": True}

# pages link to headings of one another, as they do where the repository is read
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
nb_execution_mode = "cache"
nb_execution_timeout = 120
nb_execution_raise_on_error = True

# shapes are part of the types: they stay in the signature
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
default_role = "code"  # docstrings have `names` as Markdown has them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # "*B" would be read as markup
add_module_names = False
python_maximum_signature_line_length = 88
copybutton_prompt_text = "$ "


def _skip(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """A field of a named tuple is described by its class."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """What Sphinx calls first."""
    app.connect("autodoc-skip-member", _skip)
