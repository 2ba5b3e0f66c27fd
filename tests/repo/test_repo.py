"""What README and docs say exists, and imports point one way."""

import ast
import functools
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted([*ROOT.glob("vla/**/*.py"), *ROOT.glob("envs/**/*.py"), *ROOT.glob("schemas/*.py"), *SCRIPTS])

# package -> where it may be imported; anything not named here may be imported anywhere
CONFINED = {
    "deepspeed": {
        "vla/training/engine.py",
        "vla/training/stages.py",
        "vla/training/checkpoint.py",
        "vla/distributed.py",
    },
    "transformers": {"vla/models/layers.py", "vla/models/openvla.py"},
    "peft": {"vla/models/layers.py", "vla/models/lora.py"},
    "tyro": {"vla/cli.py"},
    "pyarrow": {"envs/lerobot/read.py", "envs/lerobot/write.py"},
    "yaml": {"vla/start/flag_files.py"},
    "pydantic": {f"schemas/{path.name}" for path in ROOT.glob("schemas/*.py")},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name, modules = str(path.relative_to(ROOT)), imported(path)
    packages = {module.split(".")[0] for module in modules}
    if name.startswith("envs/"):
        assert "vla" not in packages and "deepspeed" not in packages
    if name.startswith("schemas/"):
        assert not packages & {"vla", "envs"}
        assert "torch" not in packages or name == "schemas/pixels.py"  # flags are checked before torch is imported
    if name.startswith("vla/"):
        assert not packages & {"envs", "mani_skill", "sapien"}
    if not name.startswith("envs/") or name in ("envs/__init__.py", "envs/assets/__init__.py"):
        assert not packages & {"mani_skill", "sapien"}
    assert not packages & {script.stem for script in SCRIPTS}
    for package, places in CONFINED.items():
        assert package not in packages or name in places, f"{name} imports {package}"
    if name != "vla/backends.py":
        assert not any(module.startswith(("torch.utils.tensorboard", "tensorboard")) for module in modules)


def import_graph() -> dict[str, set[str]]:
    """{module: own modules that it imports, also inside functions}; a package's `__init__` has the package's name."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    graph = {}
    for module, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inside & files.keys()
                if not inside <= files.keys():
                    found.add(node.module)
        graph[module] = (found & files.keys()) - {module}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """What is left of a graph once everything is taken away that leads nowhere: empty where there is no circle."""
    left = dict(graph)
    while leaves := [name for name, ends in left.items() if not ends & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)


def test_imports_make_no_circle():
    """Neither between modules nor between rooms (folders of vla and envs)."""
    graph = import_graph()
    assert len(graph) > 70 and "vla.models.policy" in graph["vla.training.rollout_buffer"]
    assert circle_in(graph) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]

    def room(module: str) -> str:
        folder = ".".join(module.split(".")[:2])
        return folder if (ROOT / folder.replace(".", "/")).is_dir() else module

    rooms: dict[str, set[str]] = {}
    for module, imports in graph.items():
        rooms.setdefault(room(module), set()).update({room(name) for name in imports} - {room(module)})
    assert circle_in(rooms) == []


@pytest.mark.parametrize("path", [*ROOT.glob("vla/**/*.py"), *ROOT.glob("envs/**/*.py")], ids=lambda path: path.name)
def test_no_module_receives_args(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert "args" not in {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_long(path):
    """A body has at most 60 lines: parameters and docstring are not counted. `main` is read top to bottom."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "main":
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


def shared_pieces(path: Path) -> dict[str, str]:
    """Text of every top-level function, and type and docstring of every Args field (defaults may differ)."""
    pieces = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            pieces[node.name] = ast.unparse(node)
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field, docstring in zip(node.body[::2], node.body[1::2], strict=True):
                assert isinstance(docstring, ast.Expr), f"{path.name}: --{field.target.id} has no docstring"
                pieces[f"Args.{field.target.id}"] = f"{ast.unparse(field.annotation)}: {docstring.value.value}"
    return pieces


@pytest.mark.parametrize(
    "one, other",
    [
        ("train_ppo", "train_grpo"),
        ("train_ppo", "evaluate"),
        ("train_grpo", "evaluate"),
        ("train_ppo", "train_sft"),
        ("train_sft", "evaluate"),
    ],
)
def test_same_name_same_text(one, other):
    """What stands in two scripts under one name is the same: a fix in one has to be made in the other."""
    ours, theirs = shared_pieces(ROOT / f"{one}.py"), shared_pieces(ROOT / f"{other}.py")
    both = ours.keys() & theirs.keys()
    assert {"Args.seed", "Args.protocol"} <= both
    different = {"Args.temperature", "Args.resume", "Args.video_episodes"}  # several, a switch, indices
    other_meaning = different if other == "evaluate" else set()
    for name in both - other_meaning:
        assert ours[name] == theirs[name], f"{name} differs between {one}.py and {other}.py"


# ---------------------------------------------------------------------- README and docs say what is there
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = [*PAGES, *(ROOT / name for name in ("RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "dev/LOG.md"))]
FOLDERS = "vla|envs|schemas|examples|yaml|ds_configs|tests|slurm|benchmarks|checkpoints|results|docs|dev"


def every(pages: list[Path]):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


every_page, every_text = every(PAGES), every(TEXTS)
every_guide = every([*PAGES, ROOT / "CONTRIBUTING.md"])


def test_readme_is_one_page():
    lines = README.splitlines()
    assert len(lines) <= 200, f"README has {len(lines)} lines"
    longest = max(lines, key=len)
    assert len(longest) <= 120, longest
    assert "```bash\nmake train" in README


@every_page
def test_a_page_is_short_and_reachable(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 200
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not long, f"longer than 120 characters: {long}"
    if page != ROOT / "README.md":
        assert f"](docs/{page.name})" in README, f"README does not link {page.name}"
        assert f"- {page.name}" in (ROOT / "mkdocs.yml").read_text(), f"mkdocs.yml has no {page.name}"
        first = re.split(r"(?<=[.!?])\s", text.split("\n\n")[1])[0]
        assert first.startswith("This page answers "), f"{page.name} begins with: {first}"


@every_text
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        place = (page.parent / target).resolve() if target else page
        assert place.is_file(), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links {target}#{anchor}: there are {sorted(anchors(place))}"


def test_the_website_has_a_page_for_every_link():
    """docs/site_hooks.py turns links of the repository into links of the website, and finds its way back."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    linked = set().union(*(hooks.linked_files(page) for page in TEXTS))
    assert len(linked) > 90
    for path in linked:
        assert hooks.file_at(hooks.place_of(path)) == path
    page = SimpleNamespace(file=SimpleNamespace(src_uri="algorithms.md"))
    moved = hooks.on_page_markdown("[a](../train_ppo.py) [b](../RESULTS.md#c) [d](#e) [f](https://g)", page, None, None)
    assert moved == "[a](source/train_ppo.py.md) [b](RESULTS.md#c) [d](#e) [f](https://g)"


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@every_guide
def test_every_path_exists(page):
    text = page.read_text()
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text) + re.findall(r"--config (yaml/[\w.]+)", text)
    paths += re.findall(r"`([a-z_]+\.(?:py|md|sh|txt|toml))`", text)
    made_by_a_run = {"results.md"}
    for path in set(paths) - made_by_a_run:
        assert (ROOT / path).exists() or list(ROOT.glob(f"*/{path}")), f"{page.name} names {path}"


def test_every_python_file_stands_in_the_code_tour():
    tour = (ROOT / "docs" / "code_tour.md").read_text()
    for path in MODULES:
        name = path.relative_to(ROOT)
        if path.name != "__init__.py":
            rows = [line for line in tour.splitlines() if line.startswith("| [") and f"[{name}](../{name})" in line]
            assert len(rows) == 1, f"docs/code_tour.md lacks {name}"
    measuring = (ROOT / "docs" / "performance.md").read_text()
    programs = "".join(line for line in measuring.splitlines() if line.startswith("| [benchmarks/"))
    for path in ROOT.glob("benchmarks/*.py"):
        link = f"[benchmarks/{path.name}](../benchmarks/{path.name})"
        assert programs.count(link) == 1, f"docs/performance.md lacks {link}"


@functools.cache
def known_flags() -> set[str]:
    """Every flag of a script, of a program in benchmarks/, of doctor.py, and of the tools that the docs start."""
    import collect_demos
    import evaluate
    import train_eyes
    import train_grpo
    import train_ppo
    import train_sft

    flags = {
        "help",
        "num_gpus",
        "nodes",
        "gpus",
        "ntasks",
        "cpus",
        "mem",
        "local",
        "shm",
    }  # launchers, sbatch, hf, docker
    flags |= {"hostfile", "no_ssh", "node_rank", "master_addr", "master_port", "quiet"}  # of deepspeed
    flags |= {"traj_path", "save_video", "use_env_states", "use_first_env_state"}  # of ManiSkill's replay
    flags |= {"logdir"}  # of tensorboard
    flags |= {"rm", "user", "nv", "bind"}  # docker, apptainer
    flags |= {"raw", "repo", "use"}  # any4lerobot, lerobot
    for script in (train_ppo, train_grpo, train_sft, train_eyes, collect_demos, evaluate):
        flags |= script.Args.__dataclass_fields__.keys()
    programs = [ROOT / name for name in ("doctor.py", "compare.py", "envs/lerobot/__main__.py")]
    programs += ROOT.glob("benchmarks/*.py")
    return flags | set(re.findall(r"\"--(\w+)\"", "".join(path.read_text() for path in programs)))


ELSEWHERE = {"openx2lerobot/openx_rlds.py"}  # scripts of other repositories


@every_guide
def test_every_command_exists(page):
    """make targets are in the Makefile, scripts exist, every flag is one, every make variable is read."""
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for variable in re.findall(r"make [\w-]+ ([A-Z_]+)=", text):
        assert f"{variable} ?=" in makefile, f"make {variable}="
    for script in re.findall(r"(?:deepspeed|python)(?: --\w+ \S+)* ((?:\w+/)*\w+\.py)", text):
        assert (ROOT / script).exists() or script in ELSEWHERE, script
    flags = known_flags()
    for flag in re.findall(r"--(?:no-)?([a-z][a-z_]*)", text):
        assert flag in flags or flag.removeprefix("no_") in flags, f"{page.name} names --{flag}"


@functools.cache
def all_metrics() -> set[str]:
    """Tags that the code writes, and those of a run that is kept."""
    tags = set(re.findall(r'"((?:train|rollout|env|time)/[\w/]+)"', "".join(path.read_text() for path in MODULES)))
    kept = ROOT / "results" / "make_train" / "seed_0"
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for line in (kept / name).read_text().splitlines():
            tags |= {tag for tag in json.loads(line) if "/" in tag}
    return tags


def test_every_metric_is_explained():
    table = (ROOT / "docs" / "metrics.md").read_text()
    assert len(all_metrics()) > 40
    for tag in all_metrics():
        assert f"`{tag}`" in table, f"docs/metrics.md lacks {tag}"


@every_page
def test_every_metric_that_is_named_exists(page):
    for tag in re.findall(r"`((?:train|rollout|env|eval|time|memory)/\w[\w/]*)`", page.read_text()):
        assert tag in all_metrics(), f"{page.name} names {tag}"


DETAIL = re.compile(r"\[[\w/]+\.py\]\(\.\./([\w/]+\.py)\),\s+`(\w+)`:\s+`([^`]+)`")


def function_text(path: str, name: str) -> str:
    """The text of the one function or method of a file that has this name."""
    text = (ROOT / path).read_text()
    found = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name
    ]
    return "\n".join(ast.get_source_segment(text, node) for node in found)


def test_every_detail_stands_in_the_function_that_is_named():
    """docs/algorithms.md: [file.py](../file.py), `function`: `code`. The code stands there, and once."""
    text = (ROOT / "docs" / "algorithms.md").read_text()
    details = DETAIL.findall(text)
    section = text[text.index("## Implementation details") : text.index("## More differences")]
    assert len(details) == section.count("](../") >= 12
    for path, function, code in details:
        count = function_text(path, function).count(code)
        assert count == 1, f"`{code}` stands {count} times in {function}() of {path}, docs/algorithms.md says once"


@every_text
def test_prose_is_plain(page):
    """Short sentences, hardly a semicolon, at most three numbers in a sentence, the words of the field."""
    from prose import NUMBER, measure

    prose = measure(page.read_text())
    assert prose.median_words <= 16
    assert prose.semicolons < 0.3
    full = [sentence for sentence in prose.sentences if len(NUMBER.findall(sentence)) > 3]
    assert not full, f"more than three numbers: {full}"
    assert not prose.banned, prose.banned


def test_prose_is_measured_right():
    from prose import measure

    text = "# A title; 1 2 3\n\nOne `a; 1` two. Three\nfour 5; six?\n\n- seven\n\n```\n9; 9\n```\n\n| 8; 8 | mend |\n"
    prose = measure(text)
    assert prose.sentences == ["One code two.", "Three four 5; six?", "seven"]
    assert (prose.median_words, prose.most_numbers, prose.semicolons) == (3, 1, 100 / 8)
    assert prose.banned == ["'mend' (write: fix)"]


def test_messages_in_troubleshooting_are_ours():
    """The first column of docs/troubleshooting.md quotes what a user sees; `...` stands for what varies."""
    texts = []
    for path in [*MODULES, *ROOT.glob("*.sh")]:
        texts.append(path.read_text())
        if path.suffix == ".py":
            texts += [said for node in ast.walk(ast.parse(texts[-1])) if (said := spoken(node))]
    said = "\n".join(texts)
    foreign = {"CUDA out of memory"}
    rows = re.findall(r"^\| (.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quoted = {quote for row in rows for quote in re.findall(r"`([^`]+)`", row)} - foreign - all_metrics()
    assert len(quoted) > 20
    unsaid = {quote for quote in quoted for piece in quote.split("...") if piece.strip(" ,;:") not in said}
    assert not unsaid, f"docs/troubleshooting.md quotes what nothing says: {unsaid}"


def spoken(node: ast.AST) -> str:
    """A string of the code as it is printed, `...` where a value is put in; "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_readme_has_the_results_of_results():
    """Seeds, success before, and mean and range of success after, row by row."""
    results = (ROOT / "RESULTS.md").read_text().replace("*", "")
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (0\.\d+) \| (0\.\d+ \(.*?\)) \|", README, re.M)
    assert len(rows) == 6
    for curve, seeds, before, after in rows:
        assert re.search(
            rf"^\| {re.escape(curve)} \| {seeds} \|.*\| {before} \| {re.escape(after)} \|", results, re.M
        ), curve


def test_ci_runs_the_test_command_of_readme_and_the_lint():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make lint", "make test"] and re.search(r"^make test ", README, re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    (lint,) = re.findall(r"^lint: setup\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M)
    for command in lint.split(" && "):
        assert f"entry: .venv/bin/{command.removesuffix(' .')} " in hooks


def test_the_formatter_decides():
    """Only the catalog's tables have a layout of their own."""
    files = [path for path in ROOT.rglob("*.py") if not path.parts[len(ROOT.parts)].startswith(".venv")]
    escapes = [path for path in files if re.search(r"# fmt: (skip|off)$", path.read_text(), re.M)]
    assert escapes == [ROOT / "envs" / "assets" / "catalog.py"]


def test_nothing_is_unpickled():
    """pickle runs what a file says, and files come from strangers."""
    files = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".venv")]
    assert len(files) > 100
    for path in files:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call) or name == "tests/training/test_run_folders.py"
            ):  # it makes and sets off bombs
                continue
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called.rpartition(".")[0] not in ("pickle", "cPickle", "dill", "joblib"), f"{name}: {called}"
            assert given.get("allow_pickle", "False") == "False", f"{name}: {called} with allow_pickle"
            assert given.get("weights_only", "True") == "True", f"{name}: {called} with weights_only"
            assert called != "torch.load" or "weights_only" in given, f"{name}: torch.load without weights_only"


def test_the_tracked_files_are_small_enough_to_travel():
    """To a machine with a GPU, which may take no more than 64 MiB and has no network."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.split("\0") if (ROOT / name).is_file()}
    assert sum(sizes.values()) < 64 * 2**20, sorted(sizes, key=sizes.get)[-10:]


def test_pins_are_exact():
    for name in ("requirements.txt", "requirements-docs.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert not line or line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+", line), line


def test_every_third_party_import_is_pinned():
    import sys

    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    own = {"vla", "envs", "schemas", "benchmarks", "examples"}
    own |= {script.stem for script in [*SCRIPTS, *ROOT.glob("tests/**/*.py")]}
    of_module = {"yaml": "pyyaml", "PIL": "pillow"}
    for path in [*MODULES, *ROOT.glob("tests/**/*.py")]:
        for module in imported(path):
            package = module.split(".")[0]
            if package in sys.stdlib_module_names or package in own:
                continue
            assert of_module.get(package, package).lower() in pinned, (
                f"{path.name} imports {package}, which is not pinned"
            )
