#!/usr/bin/env bash
# The steps after the base image, for Dockerfile and solovla.def. Run as root in the folder of the code:
#   container/install.sh system     Python 3.11, a compiler for DeepSpeed, Vulkan for SAPIEN, and a user
#   container/install.sh packages   .venv with the packages of requirements.txt
#   container/install.sh finish     DeepSpeed's op for CPUs, and folders that every user can write
# The base image is Ubuntu or Debian. tests/repo/test_container.py runs these steps in a bare Debian.
set -euo pipefail

say() { printf 'container: %s\n' "$*"; }

install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }

system() {
  . /etc/os-release
  local mesa=()
  if [ "$VERSION_CODENAME" = bookworm ]; then # SAPIEN needs Mesa 23.1 or newer, and Debian 12 has 22.3
    echo 'deb http://deb.debian.org/debian bookworm-backports main' >/etc/apt/sources.list.d/bookworm-backports.list
    mesa=(-t bookworm-backports)
  fi
  apt-get update -qq
  install ca-certificates
  # Ubuntu has no Python 3.11, or only 3.11.0~rc1
  if ! apt-cache show python3.11 2>/dev/null | grep '^Version: 3.11.[0-9]*[-+]' >/dev/null; then
    say "Python 3.11 from the deadsnakes archive"
    install software-properties-common
    add-apt-repository -y ppa:deadsnakes/ppa >/dev/null
  fi
  say "system packages"
  install python3.11 python3.11-venv python3.11-dev g++ make git
  install "${mesa[@]}" libvulkan1 mesa-vulkan-drivers libegl1 libgl1 libglib2.0-0
  rm -rf /var/lib/apt/lists/*

  # The driver's libraries come from the host at run time. These two files tell Vulkan and EGL their names.
  mkdir -p /usr/share/vulkan/icd.d /usr/share/glvnd/egl_vendor.d
  echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libGLX_nvidia.so.0", "api_version": "1.3.0"}}' \
    >/usr/share/vulkan/icd.d/nvidia_icd.json
  echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}' \
    >/usr/share/glvnd/egl_vendor.d/10_nvidia.json

  useradd --create-home --shell /bin/bash solovla
}

packages() {
  say "the packages of requirements.txt"
  python3.11 -m venv .venv
  .venv/bin/pip install -q --no-cache-dir --disable-pip-version-check -r requirements.txt
}

finish() {
  say "DeepSpeed's op for CPUs"
  DS_ACCELERATOR=cpu PATH="$PWD/.venv/bin:$PATH" .venv/bin/python - <<'PYTHON'
from vla.start.extensions import keep_ops

keep_ops()
from deepspeed.accelerator import get_accelerator

get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
PYTHON
  mkdir -p runs demos assets
  chmod -R a+rwX .venv/share/torch_extensions runs demos assets /home/solovla # docker run --user takes any number
  touch .venv/.ready # `make` then does not set up again
}

for step in "$@"; do "$step"; done
