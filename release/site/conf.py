"""Settings of Sphinx for `make site`, whose sources are a copy of this repository's Markdown."""

project = html_title = "cwpo_dist"
extensions = ["myst_parser", "sphinx_copybutton"]
html_theme = "furo"
exclude_patterns = ["tests", "release"]
nitpicky = True
myst_heading_anchors = 4
suppress_warnings = [
    "toc.not_included",  # pages that others link, and the menu does not
    "misc.highlighting_failure",  # rows of JSON with … for what is left out
]
