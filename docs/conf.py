# SPDX-License-Identifier: BSD-3-Clause
"""The site: ``python -m pip install ".[docs]" && sphinx-build -W docs build/site``.

Nothing here needs a connection: no inventories of other projects, formulas are MathML,
and the output of the gallery is recorded (``python -m examples.gallery``). What is written
here is only how pages are put together; each page says its own.
"""

import sys
from pathlib import Path

import fastbn

sys.path.append(str(Path(__file__).parent / "_ext"))

project = "fastbn"
author = copyright = "The fastbn developers"
version = release = fastbn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "fastbn_site",
]
exclude_patterns = ["_ext", "_templates", "gallery/backreferences", "tables/measurements"]
templates_path = ["_templates"]
default_role = "py:obj"
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autosummary_generate = ["api/index.rst"]
autodoc_typehints = "none"
autodoc_preserve_defaults = True
# So that the pages of these modules need neither the libraries nor what is compiled for them.
autodoc_mock_imports = [
    "dask", "sklearn", "torch", "fastbn.torch._direct", "fastbn.torch._dispatcher",
]  # fmt: skip
autodoc_default_options = {"inherited-members": True}
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "plot_gallery": False,
    "filename_pattern": "/plot_",
    "ignore_pattern": r"__(init|main)__\.py",
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("fastbn",),
    "reference_url": {"fastbn": None},
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
    "write_computation_times": False,
    "within_subsection_order": "fastbn_site.GalleryOrder",
}

html_theme = "pydata_sphinx_theme"
html_title = "fastbn"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"start": [], "index": [], "claims": []}

# External links: the workflow checks them, with `sphinx-build -b linkcheck`.
linkcheck_anchors = False
