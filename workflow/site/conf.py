"The site of `make site`: what Sphinx is told, and how it shows the comments of parameters."

import configparser
import inspect
import re
import sys
from dataclasses import is_dataclass
from importlib.util import find_spec
from pathlib import Path

from fastcore.docments import docments

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import sources

settings = configparser.ConfigParser()
settings.read(sources.ROOT / "settings.ini")
project = html_title = settings["DEFAULT"]["title"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["files/**"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", "(?!vae_diffusion).*")]  # of other libraries

nb_execution_mode = "off"
nb_code_prompt_hide = "Hide"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
myst_heading_slug_func = "sources.slug"

smartquotes = False
default_role = "code"
autodoc_inherit_docstrings = False
toc_object_entries = add_module_names = False
autodoc_typehints = "description"

MATHJAX = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0]) / "static/mathjax/tex-svg.js"
mathjax_path = MATHJAX.name
html_theme = "furo"
html_favicon = "static/icon.svg"
html_static_path = ["static", str(MATHJAX)]
html_css_files = ["site.css"]
html_copy_source = False


def restructured(text):
    "Markdown of a docstring or a comment: only code has a mark."
    return re.sub(r"(`[^`]*`)|([*|\\_])", lambda found: f"\\ {found[1]}\\ " if found[1] else f"\\{found[2]}", text)


def returned(function):
    "What a function says that it returns where it names no type."
    found = re.search(r"^\s*\):\s*#\s*(?:-> )?(.+)", inspect.getsource(function), re.M)
    return found[1] if found else ""


def add_comments(app, what, name, described, options, lines):
    "Add the comment of each parameter to the description, and that of what is returned."
    lines[:] = [restructured(line) for line in lines]
    described = inspect.unwrap(getattr(described, "fget", getattr(described, "func", described)))
    function = vars(described).get("__init__") if what == "class" else described
    if what not in ("class", "function", "method", "property") or not function:
        return
    comments = docments(described if is_dataclass(described) else function, args_kwargs=True)
    result = comments.pop("return", None) or (returned(function) if what != "class" else "")
    lines += ["", *(f":param {each}: {restructured(says)}" for each, says in comments.items() if says)]
    lines += [f":returns: {restructured(result)}"] * bool(result) + [""]


def is_foreign(app, what, name, member, skip, options):
    "Whether a method comes from another library, and so is left out; None if not."
    return (inspect.isfunction(member) and not member.__module__.startswith("vae_diffusion")) or None


def setup(app):
    app.connect("builder-inited", lambda app: sources.stage(Path(app.srcdir)))
    app.connect("autodoc-skip-member", is_foreign)
    app.connect("autodoc-process-docstring", add_comments)
