#!/bin/sh
# Make this clone ready: the programs from Debian, the virtual environment .venv with what
# pyproject.toml asks for, and qmpblock itself in it (editable). Does only what is missing,
# and nothing, at once, where nothing is. Two runs at a time wait for each other.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CONSTRAINTS=tools/constraints.txt
PATH=$PATH:/usr/sbin:/sbin  # where mkfs.xfs is; not everybody's has them

# command:Debian package. What a program does not need to run (its manual, its GUI) stays away.
COMMANDS="
  qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils
  nbdinfo:libnbd-bin nbdcopy:libnbd-bin nbdkit:nbdkit
  gcc:gcc openssl:openssl strace:strace mkfs.xfs:xfsprogs
"

missing_packages() {
  for pair in $COMMANDS; do
    command -v "${pair%%:*}" >/dev/null || echo "${pair#*:}"
  done
  if [ ! -e .venv/bin/python ]; then  # Debian's python3 comes without the pip for a new one
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  fi
}

install_packages() {
  packages=$(missing_packages | sort -u | tr '\n' ' ')
  [ -n "$packages" ] || return 0
  if ! command -v apt-get >/dev/null; then
    echo "setup: missing are the programs of these Debian packages: $packages" >&2
    echo "setup: install them (this system has no apt-get), then run make again" >&2
    exit 1
  fi
  if [ "$(id -u)" = 0 ]; then
    as_root="env"
  elif sudo -n true 2>/dev/null; then
    as_root="sudo"
  else
    echo "setup: missing Debian packages. Run this, then make again:" >&2
    echo "  sudo apt-get update && sudo apt-get install --no-install-recommends $packages" >&2
    exit 1
  fi
  echo "setup: installing $packages"
  for turn in 1 2 3 4 5 6; do  # another apt may hold the lists, for which apt does not wait
    # shellcheck disable=SC2086  # words on purpose
    if $as_root apt-get update -q &&
      $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
        --no-install-recommends -o DPkg::Lock::Timeout=600 $packages </dev/null
    then return 0; fi
    [ "$turn" = 6 ] || sleep 10
  done
  echo "setup: apt-get could not install $packages (its own words are above)" >&2
  exit 1
}

# The stamp says which pyproject, pins, script and place .venv was last made ready for.
wanted() { { pwd; cat pyproject.toml "$CONSTRAINTS" tools/setup.sh; } | sha256sum; }
ready() { [ "$(cat .venv/setup-stamp 2>/dev/null)" = "$(wanted)" ] && .venv/bin/python -c ''; }

prepare_venv() {
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    echo "setup: making .venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "setup: $PYTHON is older than Python 3.11; name another: make PYTHON=..." >&2
      exit 1
    }
    "$PYTHON" -m venv --clear .venv
  fi
  echo "setup: installing Python packages (pinned in $CONSTRAINTS)"
  # setuptools first, itself pinned: building in isolation would fetch whatever is newest.
  # compat: a plain path entry, where the default's import hook costs every start 20 ms.
  .venv/bin/python -m pip install -q --disable-pip-version-check -c "$CONSTRAINTS" setuptools
  .venv/bin/python -m pip install -q --disable-pip-version-check -c "$CONSTRAINTS" \
    --no-build-isolation --config-settings editable_mode=compat -e '.[dev]'
  # For tests/outside alone: in .venv itself it would shuffle this project's own tests.
  rm -rf .venv/outside
  .venv/bin/python -m pip install -q --disable-pip-version-check -c "$CONSTRAINTS" \
    --upgrade --no-deps --target .venv/outside pytest-randomly
  wanted >.venv/setup-stamp
}

[ -z "$(missing_packages)" ] && ready && exit 0
exec 9<tools/setup.sh
flock 9
install_packages
ready || prepare_venv
