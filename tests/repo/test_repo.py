"""What README says exists, and imports point one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
        assert not packages & {"vla", "envs", "torch"}
    if name.startswith("vla/"):
        assert not packages & {"envs", "mani_skill", "sapien"}
    if not name.startswith("envs/") or name in ("envs/__init__.py", "envs/assets/__init__.py"):
        assert not packages & {"mani_skill", "sapien"}
    assert not packages & {script.stem for script in SCRIPTS}
    for package, places in CONFINED.items():
        assert package not in packages or name in places, f"{name} imports {package}"
    if name != "vla/logger.py":
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
    other_meaning = {"Args.temperature", "Args.resume"} if other == "evaluate" else set()  # several; a switch
    for name in both - other_meaning:
        assert ours[name] == theirs[name], f"{name} differs between {one}.py and {other}.py"


def test_every_path_in_readme_exists():
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.S).group(1)
    paths = [word for line in tree.splitlines() for word in re.split(r"  +", line)[:-1]]
    paths += re.findall(r"`((?:vla|envs|yaml|ds_configs|tests|slurm|benchmarks)/[\w./]*)`", README)
    paths += re.findall(r"--config (\S+)", README)
    assert len(paths) > 25
    for path in paths:
        assert (ROOT / path).exists(), f"README names {path}"


def test_every_python_file_stands_in_readme():
    for path in MODULES:
        if path.name != "__init__.py":
            assert f"{path.relative_to(ROOT)} " in README, f"README's tree lacks {path.relative_to(ROOT)}"


def test_every_command_in_readme_exists():
    """make targets are in the Makefile, scripts exist, and every flag that stands in README is a flag."""
    import collect_demos
    import evaluate
    import train_grpo
    import train_ppo
    import train_sft

    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for script in re.findall(r"(?:deepspeed|python)(?: --\w+ \d+)* (\w+\.py)", README):
        assert (ROOT / script).exists(), script
    others = {"num_gpus", "gpu_memory", "help", "renderer", "download", "nodes"}  # of launchers and of doctor.py
    others |= {"hostfile", "no_ssh", "node_rank", "master_addr"}  # of deepspeed
    others |= {"traj_path", "logdir", "local"}  # of ManiSkill's replay, of tensorboard, --local-dir of hf
    others |= set(re.findall(r"\"--(\w+)\"", "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))))
    for flag in re.findall(r"--(?:no-)?([a-z]\w+)", README):
        scripts = (train_ppo, train_grpo, train_sft, collect_demos, evaluate)
        known = any(flag in script.Args.__dataclass_fields__ for script in scripts)
        assert known or flag in others, f"README names --{flag}"


LINK = re.compile(r"\[([\w/]+\.py):(\d+)\]\(([\w/]+\.py)#L(\d+)\): `([^`]+)`")


def lines_with(fragment: str, path: str) -> list[int]:
    """Numbers of the lines that hold a piece of code, from 1."""
    return [number for number, line in enumerate((ROOT / path).read_text().splitlines(), 1) if fragment in line]


def test_every_linked_line_holds_what_is_said_of_it():
    """`[file.py:12](file.py#L12): `code`` in README: the code stands on that line or the next, and nowhere else."""
    links = LINK.findall(README)
    assert len(links) == len(re.findall(r"#L\d", README)) >= 20
    for path, number, target, anchor, fragment in links:
        assert (path, number) == (target, anchor), f"README's link {path}:{number} leads to {target}:{anchor}"
        found = lines_with(fragment, path)
        assert len(found) == 1, f"{path} has `{fragment}`, which README links, on lines {found or 'none'}"
        assert found[0] - int(number) in (0, 1), (
            f"README links {path}:{number} for `{fragment}`, which is on line {found[0]}: "
            "`python tests/repo/test_repo.py` puts the numbers right"
        )


def test_numbers_in_readme_are_put_right():
    wrong = re.sub(r":(\d+)\]\((.*?)#L\d+\)", r":7](\2#L9)", README)
    assert wrong != README and with_right_numbers(wrong) == with_right_numbers(README)


def with_right_numbers(text: str) -> str:
    """README with every link to a line leading to where its code stands now."""

    def right(link: re.Match) -> str:
        path, fragment = link[1], link[5]
        found = lines_with(fragment, path)
        number = found[0] if len(found) == 1 else int(link[2])  # none, or several: for the test to say
        return f"[{path}:{number}]({path}#L{number}): `{fragment}`"

    return LINK.sub(right, text)


def test_ci_runs_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "```bash\nmake train" in README


def test_every_metric_is_explained():
    source = "".join(path.read_text() for path in MODULES)
    for tag in re.findall(r'"((?:train|rollout)/[\w/]+)"', source):
        assert f"`{tag}`" in README, f"README's table lacks {tag}"


def test_nothing_is_unpickled():
    """pickle runs what a file says, and files come from strangers."""
    files = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
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


def test_pins_are_exact():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+", line), line


def test_every_third_party_import_is_pinned():
    import sys

    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    own = {"vla", "envs", "schemas", "benchmarks", *(script.stem for script in [*SCRIPTS, *ROOT.glob("tests/**/*.py")])}
    of_module = {"yaml": "pyyaml", "PIL": "pillow"}
    for path in [*MODULES, *ROOT.glob("tests/**/*.py")]:
        for module in imported(path):
            package = module.split(".")[0]
            if package in sys.stdlib_module_names or package in own:
                continue
            assert of_module.get(package, package).lower() in pinned, (
                f"{path.name} imports {package}, which is not pinned"
            )


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_right_numbers(README))
