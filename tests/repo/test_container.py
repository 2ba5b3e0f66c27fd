"""The container: Docker and Apptainer take the same steps, and these steps work in a bare Debian."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

DOCKERFILE, RECIPE = (ROOT / "Dockerfile").read_text(), (ROOT / "solovla.def").read_text()
CODE = "/opt/solovla"
GIB = 2**30


def section(name: str) -> str:
    """The commands of a section of the Apptainer recipe."""
    return re.search(rf"^%{name}\n((?:    .*\n)+)", RECIPE, re.MULTILINE)[1]


def test_docker_and_apptainer_take_the_same_steps():
    (base,) = re.findall(r"^FROM (.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d\d\.04", base)
    assert re.findall(r"^From: (.+)$", RECIPE, re.MULTILINE) == [base]
    steps = re.findall(r"^RUN container/install.sh (\w+)$", DOCKERFILE, re.MULTILINE)
    assert section("post").split() == ["cd", CODE, "container/install.sh", *steps]
    functions = re.findall(r"^(\w+)\(\) \{$", (ROOT / "container/install.sh").read_text(), re.MULTILINE)
    assert functions == steps == ["system", "packages", "finish"]


def test_docker_runs_as_an_ordinary_user():
    """The last USER counts, and nothing is run after it."""
    last = DOCKERFILE.rindex("USER solovla")
    assert "RUN" not in DOCKERFILE[last:] and "--shm-size" in DOCKERFILE
    assert "NVIDIA_DRIVER_CAPABILITIES=all" in DOCKERFILE


def copy_code(root: Path) -> None:
    """What %setup of the recipe does."""
    environment = os.environ | {"APPTAINER_ROOTFS": str(root)}
    subprocess.run(["bash", "-euo", "pipefail", "-c", section("setup")], cwd=ROOT, env=environment, check=True)


def test_the_image_has_the_code_and_nothing_else(tmp_path):
    copy_code(tmp_path)
    code = tmp_path / CODE.strip("/")
    found = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in listed if (ROOT / name).exists()} <= found
    left_out = (".git", ".venv", "runs", "demos", "site", "assets")
    assert not [name for name in found if name.split("/")[0] in left_out or "__pycache__" in name]


class BareDebian:
    """A bare Debian in a folder. Every command gets mounts of its own, which end with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        debootstrap = ["debootstrap", "--variant=minbase", "bookworm", str(folder)]
        made = subprocess.run(debootstrap, capture_output=True, text=True, timeout=1800)
        assert made.returncode == 0, made.stdout[-2000:]
        self.mounts = [f"mount --rbind /dev {folder}/dev", f"mount -t proc proc {folder}/proc"]
        self.settings = {}  # of pip on this machine: the container itself has none
        for name, value in os.environ.items():
            if name.startswith("PIP_"):
                self.settings[name] = self._shown(Path(value)) if value.startswith("/") else value

    def _shown(self, path: Path) -> str:
        """Where commands see a folder or a file of this machine. The system's own files stay as they are."""
        place = self.folder / "this_machine" / path.name
        place.parent.mkdir(exist_ok=True)
        if path.is_dir():
            place.mkdir()
            self.mounts.append(f"mount --rbind {path} {place}")
        elif path.is_file():
            shutil.copy(path, place)
        return f"/this_machine/{path.name}"

    def run(self, script: str, user: str = "root", **environment: str) -> str:
        """Run commands as this user, in the folder of the code. Returns what they printed."""
        values = {"HOME": f"/home/{user}", "PATH": f"{CODE}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        words = [f"{name}={value}" for name, value in (values | environment).items()]
        inside = [
            "chroot",
            f"--userspec={user}",
            str(self.folder),
            "/usr/bin/env",
            "-i",
            *words,
            "bash",
            "-euc",
            script,
        ]
        command = ["unshare", "--mount", "bash", "-euc", "; ".join([*self.mounts, 'exec "$@"']), "bash", *inside]
        found = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600, stdin=subprocess.DEVNULL
        )
        assert found.returncode == 0, found.stdout[-5000:]
        return found.stdout


def why_not(folder: Path) -> str | None:
    """Why a bare Debian cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root, to make a bare Debian"
    missing = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install debootstrap"
    if shutil.disk_usage(folder).free < 12 * GIB:
        return "needs 12 GiB of disk"
    return None


@pytest.mark.slow
@pytest.mark.full
def test_the_steps_work_in_a_bare_debian(tmp_path):
    """They end in a machine where doctor.py has nothing to fix and PPO trains. It takes ten minutes and 4 GB."""
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    try:
        debian = BareDebian(tmp_path / "root")
        copy_code(debian.folder)
        print(debian.run(section("post"), HOME="/root", **debian.settings))
        for name in ("vulkan/icd.d/nvidia_icd.json", "glvnd/egl_vendor.d/10_nvidia.json"):
            assert "nvidia.so.0" in json.loads((debian.folder / "usr/share" / name).read_text())["ICD"]["library_path"]
        checked = debian.run(f"cd {CODE}; python doctor.py", "solovla", DS_ACCELERATOR="cpu")
        print(checked)
        assert "FIX" not in checked and re.search(r"^ok +launch", checked, re.MULTILINE)
        small = "--num_iterations 1 --num_envs 4 --num_steps 40 --num_eval_episodes 4 --num_eval_envs 2"
        train = f"train_ppo.py --config yaml/quickstart_ppo_openvlaoft.yaml {small} --run_dir runs/one"
        flags = dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        trained = debian.run(f"cd {CODE}; make --dry-run train; deepspeed --num_gpus 1 {train}", "solovla", **flags)
        print(trained)
        run_dir = debian.folder / CODE.strip("/") / "runs/one"
        assert (run_dir / "checkpoints/iteration_000001").is_dir()
        assert "./setup.sh" not in trained  # `make` finds everything ready
    finally:
        subprocess.run(["umount", tmp_path / "root/proc"], capture_output=True)  # of a debootstrap that was stopped
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
