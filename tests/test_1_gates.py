"What must be true of the files themselves."

import ast
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from conftest import ROOT, git, run, tracked
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from packaging.requirements import Requirement

PAGES = tracked("nbs/*.ipynb")
EXPERIMENTS = [p for p in PAGES if p.startswith("nbs/experiments/")]
FOLDERS = (
    "core",
    "method",
    "metrics",
    "harness",
    "benchmark",
)  # of the pages that define, in the order in which they may import


def cells(page, kind="code"):
    return [c for c in json.loads((ROOT / page).read_text())["cells"] if c["cell_type"] == kind]


def defined(folder):
    "The modules that the pages of a folder define, in the order of the pages."
    return [
        "".join(cells(page)[0]["source"]).split()[2].removesuffix(".__init__")
        for page in tracked(f"nbs/{folder}/*.ipynb")
    ]


def file_of(module):
    "The file of a module."
    path = ROOT / "vae_diffusion" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


ORDER = [module for folder in FOLDERS for module in defined(folder)]


@pytest.mark.skipif("CI" not in os.environ, reason="the tree need only be clean in CI")
def test_tree_is_clean():
    assert git("status", "--porcelain") == ""


@pytest.mark.parametrize("kind", ["archive", "of another user"])
def test_the_tests_run_in_every_copy(kind, tmp_path):
    "In an unpacked archive, without git's folder, and in a checkout that belongs to somebody else."
    if kind == "of another user" and os.geteuid():
        pytest.skip("only the superuser can give a folder away")
    copy = tmp_path / "copy"
    for f in tracked("."):
        (copy / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, copy / f)
    if kind == "of another user":
        run("git", "init", "--quiet", copy)
        for f in [copy, *copy.rglob("*")]:
            os.chown(f, 65534, 65534)
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_1_gates.py"]
    found = subprocess.run(collect, cwd=copy, capture_output=True, text=True)
    assert not found.returncode and "test_page[nbs/core/01_paths.ipynb]" in found.stdout, found.stdout + found.stderr


def test_clean_and_export_change_nothing(tmp_path):
    for f in tracked("."):
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, tmp_path / f)
    for command in "nbdev_clean", "nbdev_export":
        subprocess.run([command], cwd=tmp_path, check=True, capture_output=True)
    changed = [f for f in tracked(".") if (ROOT / f).read_bytes() != (tmp_path / f).read_bytes()]
    assert not changed, f"run nbdev_clean and nbdev_export: {changed}"


def test_every_page_is_tidy():
    import tidy

    assert {f.relative_to(ROOT).as_posix() for f in tidy.pages()} == {*PAGES}, "HALLWAY of workflow/tidy.py"
    untidy = [file.name for file, before, after in tidy.tidied() if before != after]
    assert not untidy, f"run `make tidy`: {untidy}"


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_parameters_cell_agrees_with_settings(page):
    from vae_diffusion.harness.execution import parameters_cell
    from vae_diffusion.harness.settings import collect_settings, load_params

    tagged = [c for c in cells(page) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{page}: {len(tagged)} cells are tagged 'parameters', there must be one"
    lines = "".join(tagged[0]["source"]).splitlines()
    assert lines[0].startswith('params = "digits-cpu" # ') and all(line[:2] in ("", "# ") for line in lines[1:])
    shown = "\n".join(line[2:] for line in lines[1:] if re.match(r"# [a-z_0-9]+ = \S", line))
    for source in lines[0], f"{lines[0]}\n{shown}":  # with and without what can be uncommented
        exec(source, names := {})
        del names["__builtins__"]
        assert collect_settings(names) == load_params("digits"), f"{page}: not the parameters of digits-cpu"
    declared = parameters_cell(Path(page).stem)
    assert "".join(tagged[0]["source"]) == declared, (
        f"{page}: its parameters cell is not the declared one: run `make parameters`"
    )


@pytest.mark.parametrize("file", tracked("nbs/experiments/params/*.yaml"))
def test_params_are_settings(file):
    from vae_diffusion.harness.settings import load_params

    names = yaml.safe_load((ROOT / file).read_text())
    assert load_params(names["dataset"], names["scale"])
    assert file.endswith(f"/{names['dataset']}-{names['scale']}.yaml")


WIDTH, PAGE_WIDTH = 120, 110  # columns; a page is also read in a browser
CODE = "tests/*.py", "tests/*.toml", "workflow/*", ".ci/run", "Makefile", "vae_diffusion/*.py", "nbs/*.ipynb"
MADE_BY_NBDEV = "vae_diffusion/_modidx.py"
QUOTES = re.compile(r"(before|after) = |__all__ = ")  # a line of another file, or what nbdev writes


def lines_of_code(file):
    "Where each line of code in a file stands, and the line: in a page, the cell and the line within it."
    if not file.endswith(".ipynb"):
        return [(f"{file}:{i}", line) for i, line in enumerate((ROOT / file).read_text().splitlines(), 1)]
    found = []
    for number, cell in enumerate(json.loads((ROOT / file).read_text())["cells"], 1):
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            found += [(f"{file}:cell {number}:{i}", line) for i, line in enumerate(lines, 1)]
    return found


def test_lines_are_narrow():
    files = [f for pattern in CODE for f in tracked(pattern) if f != MADE_BY_NBDEV]
    lines = [(at, line, PAGE_WIDTH if f.endswith(".ipynb") else WIDTH) for f in files for at, line in lines_of_code(f)]
    wide = [at for at, line, width in lines if len(line) > width and not QUOTES.match(line)]
    assert not wide, f"more than {PAGE_WIDTH} columns in a page, or {WIDTH}: {', '.join(wide)}"


VERBS_IN_S = "Pass", "Express", "Compress", "Process", "Access", "Focus", "Discuss"
NO_VERBS = "A", "An", "The", "All", "Each", "Every", "How", "No", "One", "What", "Where", "Whether", "Which"


def is_imperative(docstring):
    "Whether a docstring may begin with a verb in the imperative: no article, no third person, a capital letter."
    first = docstring.split()[0].strip(".,:;`")
    third_person = first.endswith("s") and first not in VERBS_IN_S
    return first[:1].isupper() and first not in NO_VERBS and not third_person


def test_docstrings_of_functions_begin_with_a_verb():
    "Those of everything that the library exports."
    wrong = []
    for file in tracked("vae_diffusion/*.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
            if text and not is_imperative(text):
                wrong.append(f"{file}:{node.lineno} {node.name}: {text.splitlines()[0]}")
    assert not wrong, "docstrings that do not begin with a verb in the imperative: " + "; ".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    assert os.path.getsize(ROOT / page) < 300_000, "a page stays under 300 KB"
    text = (ROOT / page).read_text()
    outputs = [o for c in cells(page) for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], (
        "stored errors or warnings"
    )
    stored = json.dumps([outputs, json.loads(text)["metadata"]])
    assert "application/vnd.jupyter.widget" not in stored and not re.search(r"/(root|home|Users)/", text), (
        "stored widgets, or paths of one machine"
    )
    first = "".join(cells(page, "markdown")[0]["source"])
    assert re.match(r"# .+\n\n> .+", first), "a page starts with a title and one line that describes it"


def imported(module):
    "The modules of the library that one of them imports."
    file, name, found = file_of(module), f"vae_diffusion.{module}", set()
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            base = importlib.util.resolve_name("." * node.level + base, package)
        if base.startswith("vae_diffusion"):
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {each.removeprefix("vae_diffusion.") for each in found} & set(ORDER) - {module}


def test_imports_point_one_way():
    "Folder by folder, and within a folder in the order of the pages' numbers."
    for i, module in enumerate(ORDER):
        late = imported(module) - set(ORDER[:i])
        assert not late, f"{module} imports {late}"
    packages = {f"vae_diffusion/{m.split('.')[0]}/__init__.py" for m in ORDER if "." in m}
    made = (
        {file_of(m).relative_to(ROOT).as_posix() for m in ORDER}
        | packages
        | {"vae_diffusion/__init__.py", "vae_diffusion/_modidx.py"}
    )
    assert made == set(tracked("vae_diffusion/*.py"))


def test_readme_is_made_from_index(tmp_path):
    "By the interpreter of the environment, though the user has a kernel of the same name, and prefers it."
    kernel = tmp_path / ".local/share/jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["false", "{connection_file}"], "display_name": "Python 3", "language": "python"}')
    own = {"HOME": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "0", "JUPYTER_PATH": str(kernel.parents[2])}
    made = f"README={tmp_path / 'README.md'}", f"INDEX={tmp_path / 'index.ipynb'}"
    run("make", "--no-print-directory", "readme", *made, env=os.environ | own)
    for made in "README.md", "nbs/index.ipynb":
        assert (tmp_path / made.split("/")[-1]).read_text() == (ROOT / made).read_text(), (
            f"{made} and data/results disagree: run `make readme`"
        )


@pytest.mark.parametrize("file", tracked("data/weights/*/pipeline.py"))
def test_code_beside_published_weights_is_the_librarys(file):
    from vae_diffusion import pipelines
    from vae_diffusion.core import files

    assert (ROOT / file).read_text() == pipelines.pipeline_code(), (
        f"{file} is not what `pipelines.save_pipeline` writes now"
    )
    files.verify_folder((ROOT / file).parent)


def test_studies_page_shows_every_study():
    text = (ROOT / "nbs/harness/13_studies.ipynb").read_text()
    for file in tracked("nbs/experiments/studies/*.yaml"):
        assert f"| {file.split('/')[-1].removesuffix('.yaml')} " in text, f"the page does not show {file}: run it again"


def boxes_of_lines(text, renderer):
    "The extents of the lines of a text: left, bottom, right, top. Those of a turned text are one."
    box, lines = text.get_window_extent(renderer), text.get_text().split("\n")
    if text.get_rotation() or len(lines) == 1:
        return [box.extents]
    widths = [renderer.get_text_width_height_descent(line, text.get_fontproperties(), False)[0] for line in lines]
    share = {"left": 0, "center": 0.5, "right": 1}[text.get_ha()]
    left, step = [box.x0 + share * (box.width - w) for w in widths], box.height / len(lines)
    return [(x, box.y1 - (i + 1) * step, x + w, box.y1 - i * step) for i, (x, w) in enumerate(zip(left, widths))]


def colliding_texts(fig):
    "The pairs of texts of a figure that cover each other, and the texts that it cuts off."
    canvas, hidden = FigureCanvasAgg(fig), set()
    canvas.draw()
    renderer = canvas.get_renderer()
    for axis in [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        ticks = [t for t in axis.get_major_ticks() + axis.get_minor_ticks() if not low <= t.get_loc() <= high]
        hidden |= {label for t in ticks for label in (t.label1, t.label2)}
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]
    boxes = [(t.get_text(), box) for t in texts for box in boxes_of_lines(t, renderer)]
    found = [a for a, (x0, y0, x1, y1) in boxes if min(x0, y0) < -1 or x1 > fig.bbox.x1 + 1 or y1 > fig.bbox.y1 + 1]
    for (a, p), (b, q) in itertools.combinations(boxes, 2):
        if min(p[2], q[2]) - max(p[0], q[0]) > 1 and min(p[3], q[3]) - max(p[1], q[1]) > 1:
            found.append((a, b))
    return found


def test_colliding_texts_are_found():
    fig, ax = plt.subplots()
    ax.set_title("a title")
    assert not colliding_texts(fig)
    ax.annotate("wider than wide\nbelow", (0.5, 0.5), xycoords="axes fraction", ha="center")
    ax.annotate("beside", (0.6, 0.5), xycoords="axes fraction")
    assert not colliding_texts(fig)
    ax.annotate("over it", (0.6, 0.55), xycoords="axes fraction")
    fig.text(0.99, 0.99, "cut off")
    assert colliding_texts(fig) == ["cut off", ("wider than wide\nbelow", "over it")]
    plt.close(fig)


@pytest.mark.parametrize("csv", tracked("data/results/*.csv"))
def test_published_figures_are_drawn_from_published_results(csv, tmp_path):
    from vae_diffusion.benchmark import report
    from vae_diffusion.harness import figures, settings, studies, style

    name, table = csv.split("/")[-1].removesuffix(".csv"), pd.read_csv(ROOT / csv, dtype={"config": str})
    if name.startswith("bench-"):
        drawn = report.benchmark_figures(table)
    elif "variant" in table:
        name, drawn = f"{table.dataset[0]}-{table.scale[0]}", studies.study_figures(table, name)
    else:
        drawn = figures.figures_from_results(table, settings.load_params(*name.rsplit("-", 1)))
    for figure, fig in drawn.items():
        style.save_figure(fig, tmp_path, figure)
        plt.close(fig)
        small = [t.get_text() for t in fig.findobj(Text) if t.get_text() and t.get_fontsize() < 8]
        assert not small and fig.get_figwidth() <= style.WIDTH, f"{figure}: wider than a page, or small type: {small}"
        assert fig.get_suptitle() and "_" not in style.describe(fig), f"{figure}: it must say in words what it shows"
        assert "better" in style.describe(fig), f"{figure}: no axis says which way is better"
        assert not colliding_texts(fig), f"{figure}: texts cover each other or are cut off: {colliding_texts(fig)}"
        assert (tmp_path / f"{figure}.svg").read_text() == (ROOT / f"figures/{name}/{figure}.svg").read_text(), (
            f"figures/{name}/{figure}.svg is not what {csv} shows"
        )


@pytest.mark.parametrize("notebook", tracked("nbs/experiments/*.ipynb"))
def test_no_parameter_is_overwritten(notebook):
    "A cell that is run again must not take a variable of a later one for a parameter."
    from dataclasses import fields

    from vae_diffusion.harness.settings import Settings

    cells = [c for c in json.loads((ROOT / notebook).read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(c["source"]) for c in cells if "parameters" not in c["metadata"].get("tags", []))
    top = [n for n in ast.parse(code).body if not isinstance(n, ast.FunctionDef)]
    inner = {id(x) for n in top for c in ast.walk(n) if isinstance(c, ast.comprehension) for x in ast.walk(c)}
    stored = {x.id for n in top for x in ast.walk(n) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
              and id(x) not in inner}
    assert not stored & {f.name for f in fields(Settings)}, notebook


# Tables whose augmented runs resampled bilinearly; nbs/differences.ipynb names them.
BILINEAR = {"fashion_mnist-mol", "cifar10-cpu"}


@pytest.mark.parametrize("csv", [f for f in tracked("data/results/*.csv") if "/bench-" not in f])
def test_published_results_belong_to_the_parameters(csv, monkeypatch):
    from dataclasses import replace

    from vae_diffusion import sources
    from vae_diffusion.harness import identity, results, settings, studies

    name, table = csv.split("/")[-1].removesuffix(".csv"), pd.read_csv(ROOT / csv, dtype={"config": str})
    grid = (
        [r for _, r in studies.load_study(name).runs()]
        if "variant" in table
        else results.grid(settings.load_params(*name.rsplit("-", 1)))
    )
    stale = set(table.config) - {r.digest for r in grid}
    if name in BILINEAR:  # augmented runs of before have no word of their resampling
        plain = {m: replace(method, config=None) for m, method in sources.METHODS.items()}
        monkeypatch.setattr(sources, "METHODS", plain)
        monkeypatch.setattr(identity, "METHODS", plain)
        augmented = [r for r in grid if r.settings.method.startswith("aug_")]
        assert stale == {identity.Run(r.stage, r.settings).digest for r in augmented}
        stale = {}
    assert not stale, f"{csv} holds runs of other parameters than {name} has now: {stale}"


def without_words(page):
    "The cells of a page that show a picture without alternative text."
    found = []
    for cell in cells(page):
        for output in cell["outputs"]:
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            mute = [kind for kind in kinds if not output["metadata"].get(kind, {}).get("alt", "").strip()]
            html = "".join(output.get("data", {}).get("text/html", ""))
            if mute or re.search(r"<img(?![^>]* alt=.\w)", html):
                found.append(f"{page}:{cell['id']}")
    return found


def test_pictures_have_words_and_none_is_published_twice():
    mute = [f for f in tracked("*.ipynb") + tracked("*.md") if re.search(r"!\[\s*\]\(", (ROOT / f).read_text())]
    mute += [cell for page in PAGES for cell in without_words(page)]
    assert not mute, f"a picture without alternative text: {mute}"
    seen = {}
    for f in tracked("figures/*.png"):
        seen.setdefault((ROOT / f).read_bytes(), []).append(f)
    assert all(len(files) == 1 for files in seen.values()), [files for files in seen.values() if len(files) > 1]


def test_overview_figure_is_drawn_from_published_results(tmp_path):
    from vae_diffusion.harness import figures, studies, style

    style.save_figure(figures.forest_plot(studies.complete_comparisons(), figures.OVERVIEW), tmp_path, "overview")
    assert (tmp_path / "overview.svg").read_text() == (ROOT / "figures/overview.svg").read_text(), (
        "figures/overview.svg is not what data/results shows"
    )


def declared():
    "What the library, the experiments, the page to play with, the export to Parquet and SOAP say that they need."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]
    more = [r for name in ("experiments", "play", "parquet", "soap") for r in extra[name]]
    return [Requirement(r) for r in project["dependencies"] + more]


def test_lower_bounds_are_versions_that_were_tried():
    "By `make oldest`, which takes too long for here."
    lines = (ROOT / "requirements-oldest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if line[0] != "#")
    for r in declared():
        assert str(r.specifier) == f">={tried[r.name]}", f"{r}: requirements-oldest.txt has {tried[r.name]}"


def test_what_is_imported_is_declared_and_what_is_declared_imported():
    "So the experiments run where nothing else is installed, neither Snakemake nor what tests need."
    sources = [(ROOT / f).read_text() for f in tracked("vae_diffusion/*.py")]
    sources += ["".join(c["source"]) for page in EXPERIMENTS for c in cells(page)]
    imports = [n for s in sources for n in ast.walk(ast.parse(s)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = [
        n.module if isinstance(n, ast.ImportFrom) else a.name
        for n in imports
        for a in n.names
        if not getattr(n, "level", 0)
    ]
    found = {m.split(".")[0] for m in modules} - {*sys.stdlib_module_names, "vae_diffusion"}
    found -= {"pythae", "pytorch_msssim", "torchmetrics"}  # rivals of `make bench`, which installs them
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml", "IPython": "ipykernel", "PIL": "pillow"}
    names |= {m: m.replace("_", "-") for m in ("huggingface_hub", "pytorch_optimizer")}
    indirectly = {"tabulate"}  # by pandas, for `to_markdown`
    assert {names.get(m, m) for m in found} | indirectly == {r.name for r in declared()}
