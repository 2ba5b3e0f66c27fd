#!/usr/bin/env bash
# `make setup` runs this script. It makes .venv and installs the pinned packages. It also installs a compiler for
# DeepSpeed and a Vulkan driver for SAPIEN, if they are missing and you are root. It names system packages before it
# installs them. Without root it prints the commands instead.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf 'setup: %s\n' "$*"; }

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3; do # the tests ran on 3.11
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
      echo "$candidate"
      return
    fi
  done
  say "no Python 3.11 or 3.12 on PATH: install one, or set PYTHON=/path/to/python" >&2
  exit 1
}

# apt_install WHY PACKAGE...: install the packages as root, or print the commands and stop
apt_install() {
  local why=$1 options=()
  shift
  if grep -qs 'VERSION_CODENAME=bookworm' /etc/os-release && [[ " $* " == *" mesa-vulkan-drivers "* ]]; then
    options=(-t bookworm-backports) # SAPIEN needs Mesa 23.1 or newer, and Debian 12 has 22.3
  fi
  local source='deb http://deb.debian.org/debian bookworm-backports main' list=/etc/apt/sources.list.d/bookworm-backports.list
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    say "$why. As root, run:"
    [ ${#options[@]} = 0 ] || echo "  echo '$source' > $list"
    echo "  apt-get update && apt-get install -y ${options[*]} $*"
    exit 1
  fi
  say "$why: installing $* ${options[*]}"
  if [ ${#options[@]} != 0 ] && ! grep -rqs 'bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
    echo "$source" >"$list"
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${options[@]}" "$@" >/dev/null
}

python=$(find_python)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [ ! -x .venv/bin/python ]; then
  say "creating .venv with $("$python" --version)"
  "$python" -c 'import ensurepip' 2>/dev/null || apt_install "Python's venv module is missing" "python$version-venv"
  "$python" -m venv .venv
fi
say "installing the packages of requirements.txt"
.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt

missing=()
command -v g++ >/dev/null || missing+=(g++)
[ -f "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] || missing+=("python$version-dev")
[ ${#missing[@]} = 0 ] || apt_install "DeepSpeed needs a compiler on a CPU" "${missing[@]}"

if ! .venv/bin/python doctor.py --renderer >/dev/null; then
  apt_install "SAPIEN finds no Vulkan device that it accepts" mesa-vulkan-drivers libvulkan1 libgl1 libglib2.0-0
fi
say "checking this machine. The first time, DeepSpeed compiles an operation for CPUs (a minute or two)"
.venv/bin/python doctor.py
