"""What every page has, whoever writes it: `make tidy` puts it in.

Links to the pages before and after it, in the order in which they are read; and cells that only import or only check,
collapsed where JupyterLab shows them.
"""

import ast
import json
import os
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
HALLWAY = """index tour play glossary results/overview results/digits results/binary_mnist results/fashion_mnist
    results/cifar10 results/controls results/optimizers results/benchmarks results/reliability differences reproduce gpu
    experiments/train_diffusion experiments/measure_diffusion experiments/sample_bank experiments/train_vae
    experiments/measure_gaps experiments/measure_encoder experiments/report library own_data adding""".split()
FOLDERS = "method", "metrics", "core", "harness", "benchmark"  # of the pages that define
LINKS = re.compile(r"\n*^(?:Previous: |Next: |Back:? ).*\Z", re.M)


def pages():
    "All pages, in the order in which they are read."
    return [NBS / f"{name}.ipynb" for name in HALLWAY] + [f for d in FOLDERS for f in sorted((NBS / d).glob("*.ipynb"))]


def title(cells):
    "The heading of a page."
    return next(found[1] for c in cells if (found := re.match("# (.+)", "".join(c["source"]))) and "outputs" not in c)


def linked(page, before, after):
    "The links from a page to its neighbours, each a file and its title."
    if not before:  # README.md is made of the first page, from the root
        return f"Next: [{after[1]}](../nbs/{after[0].name})"
    found = [("Previous: ", *before)] + ([("next: ", *after)] if after else [])
    if before[0].name != "index.ipynb":
        found.insert(1, ("", NBS / "index.ipynb", "first page"))
    return " · ".join(f"{word}[{name}]({os.path.relpath(file, page.parent)})" for word, file, name in found)


def aside(cell):
    "Whether a cell is not what a reader came for: it only imports, or checks and shows nothing."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code" or cell["outputs"] or "parameters" in cell["metadata"].get("tags", []):
        return False
    try:
        nodes = ast.parse(re.sub(r"^#\|.*$|^%.*$", "", source, flags=re.M)).body
    except SyntaxError:
        return False
    if nodes and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes):
        return True
    checks = any(isinstance(n, ast.Assert) for node in nodes for n in ast.walk(node)) or "pytest.raises" in source
    return checks and not re.search(r"^#\| ?export", source, re.M)


def tidy(page, content, before=None, after=None):
    "Puts both into the content of a page."
    last = content["cells"][-1]
    cells = content["cells"] = [c for c in content["cells"] if c is last or c["id"] != "links000"]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["metadata"].pop("jupyter", None)
            if aside(cell):
                cell["metadata"]["jupyter"] = {"source_hidden": True}
    if last["cell_type"] != "markdown":
        cells.append(last := {"cell_type": "markdown", "id": "links000", "metadata": {}, "source": []})
    text = LINKS.sub("", "".join(last["source"]))
    last["source"] = f"{text}\n\n{linked(page, before, after)}".lstrip("\n").splitlines(keepends=True)
    return content


def written(content):
    "As nbdev writes it."
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def tidied():
    "Each page, its content, and what it should be."
    files = pages()
    read = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    ends = [None, *((f, title(c["cells"])) for f, c in zip(files, read)), None]
    for file, content, before, after in zip(files, read, ends, ends[2:]):
        yield file, written(content), written(tidy(file, content, before, after))


if __name__ == "__main__":
    for file, before, after in tidied():
        if before != after:
            file.write_text(after, encoding="utf-8")
