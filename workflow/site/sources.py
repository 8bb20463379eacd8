"""What Sphinx reads: the pages with their stored outputs, chapters, and the reference of each module.

The order is that of `workflow/tidy.py`. A link that leads to no file stays as it is, and Sphinx refuses it.
"""

import importlib
import inspect
import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import tidy

ROOT = tidy.NBS.parent
ADDED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # pages that are no notebooks
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
PICTURES = ".png", ".svg"
LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")


def slug(heading):
    "How a page links to a heading: JupyterLab's way."
    return heading.replace(" ", "-")


def lead(text, folder, site):
    "Let links and pictures of Markdown lead to files of the site, to which files of the project are copied."

    def new(found):
        file = (ROOT / folder / found[1]).resolve()
        if file.suffix == ".ipynb" and file.is_relative_to(tidy.NBS):
            return f"](/{file.relative_to(tidy.NBS)}{found[2] or ''})"
        if not (file.is_relative_to(ROOT) and file.is_file()):
            return found[0]
        path = file.relative_to(ROOT).as_posix()
        if path in ADDED:
            return f"](/{ADDED[path]}{found[2] or ''})"
        (site / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, site / "files" / path)
        return f"](/files/{path})" if file.suffix in PICTURES else f"](path:/files/{path})"

    parts = CODE.split(text)
    return "".join(part if i % 2 else LINK.sub(new, part) for i, part in enumerate(parts))


def staged(cell, folder, site):
    "The cells by which the site shows a cell: what nobody should see is left out, and each picture has its words."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        source = lead(tidy.LINKS.sub("", source), folder, site)
        return [{**cell, "source": source}] if source else []
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    meta = {}
    if tidy.aside(cell):
        meta = {"tags": ["hide-input"], "mystnb": {"code_prompt_show": "Check" if "assert" in source else "Imports"}}
    shown = [{**cell, "source": source, "metadata": meta, "outputs": []}]
    if "hide" in cell["metadata"].get("tags", []) or not source:
        shown = []
    for number, output in enumerate(cell["outputs"]):
        data, meta = output.get("data", {}), {"tags": ["remove-input"]}
        if text := data.get("text/markdown"):
            data["text/markdown"] = lead("".join(text), folder, site)
        if "image/png" in data:
            meta["mystnb"] = {"image": {"alt": output["metadata"]["image/png"]["alt"]}}
        shown.append({**cell, "id": f"{cell['id']}-{number}", "metadata": meta, "outputs": [output]})
    return shown


def module_of(page):
    "The module that a page defines, if it does."
    first = "".join(page["cells"][0]["source"])
    return first.startswith("#| default_exp") and "vae_diffusion." + first.split()[2].removesuffix(".__init__")


def stage_page(file, site):
    "Write a page."
    page = json.loads(file.read_text(encoding="utf-8"))
    name = module_of(page)
    page["cells"] = [new for cell in page["cells"] for new in staged(cell, file.parent.relative_to(ROOT), site)]
    if name:
        page["cells"][0]["source"] += f"\n\nReference: [`{name}`](/reference/{name}.rst)"
    page["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    to = site / file.relative_to(tidy.NBS)
    to.parent.mkdir(exist_ok=True)
    to.write_text(json.dumps(page), encoding="utf-8")


def head(file):
    "The heading and the description of a page."
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.match(r"# (.+)\n\n> (.+)", text).groups()


def modules():
    "Each module of the library, and the page that defines it."
    for file in tidy.pages():
        if name := module_of(json.loads(file.read_text(encoding="utf-8"))):
            yield name, file


def titled(title, *parts):
    "A page in reStructuredText."
    return "\n\n".join([f"{title}\n{'=' * len(title)}", *parts]) + "\n"


def toctree(pages, *options):
    "What is below a page."
    return "\n".join([".. toctree::", *(f"   {option}" for option in options), "", *(f"   {page}" for page in pages)])


def stage_chapter(folder, files, site):
    "Write the list of the pages of a folder."
    lines = [f"* :doc:`/{f.relative_to(tidy.NBS).with_suffix('')}`: {head(f)[1]}" for f in files]
    below = toctree([f.stem for f in files], ":hidden:")
    (site / folder / "index.rst").write_text(titled(folder.capitalize(), "\n".join(lines), below), encoding="utf-8")


def described(name):
    "How the reference describes a module: links to all names that it hands on, then what it defines itself."
    module = importlib.import_module(name)
    names = {each: getattr(module, each) for each in getattr(module, "__all__", [])}
    routines = {each: value for each, value in names.items() if hasattr(value, "__qualname__")}
    origins = {each: routines[each].__module__ if each in routines else name for each in names}
    yield " · ".join(f":py:obj:`{each} <{origin}.{each}>`" for each, origin in origins.items())
    for each, value in routines.items():
        if origins[each] == name:
            yield f".. autoclass:: {each}\n   :members:\n   :member-order: bysource" if inspect.isclass(value) else (
                f".. autofunction:: {each}")
    yield from (f".. py:data:: {each}" for each in names if each not in routines)


def stage_reference(site):
    "Write a page for each module."
    listed = []
    for name, file in modules():
        page = file.relative_to(tidy.NBS).with_suffix("")
        title, says = head(file)
        about = f"{says}. Explained and tested on the page :doc:`{title} </{page}>`."
        text = titled(f"``{name}``", about, f".. py:currentmodule:: {name}", *described(name))
        (site / "reference" / f"{name}.rst").write_text(text, encoding="utf-8")
        listed.append(f"* :doc:`{name}`: {says}")
    below = [f"{name.removeprefix('vae_diffusion.')} <{name}>" for name, _ in modules()]
    text = titled("Reference", "\n".join(listed), toctree(below, ":hidden:"))
    (site / "reference" / "index.rst").write_text(text, encoding="utf-8")


def stage(site):
    "Write all sources of the site into a folder."
    (site / "reference").mkdir(parents=True)
    below = []
    for folder, files in groupby(tidy.pages()[1:], lambda file: file.parent.relative_to(tidy.NBS).as_posix()):
        files = list(files)
        below += [f"{folder}/index"] if folder != "." else [f.stem for f in files]
        for file in files:
            stage_page(file, site)
        if folder != ".":
            stage_chapter(folder, files, site)
    stage_page(tidy.pages()[0], site)
    stage_reference(site)
    for file, page in ADDED.items():
        (site / page).write_text(lead((ROOT / file).read_text(encoding="utf-8"), "", site), encoding="utf-8")
    below += ["reference/index", *(page.removesuffix(".md") for page in ADDED.values())]
    first = json.loads((site / "index.ipynb").read_text(encoding="utf-8"))
    text = "```{toctree}\n:hidden:\n\n" + "\n".join(below) + "\n```\n"
    first["cells"].append({"cell_type": "markdown", "id": "chapters", "metadata": {}, "source": text})
    (site / "index.ipynb").write_text(json.dumps(first), encoding="utf-8")
