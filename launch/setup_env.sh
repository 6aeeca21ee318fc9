#!/usr/bin/env bash
# Makes .venv with everything that `make demo` and `make test` need; the Makefile calls it.
# Does nothing when .venv is already right. Needs no compiler and no GPU.
#
#   PYTHON                interpreter to build on (default: the first python3 that is >= 3.10)
#   GENRECAL_TORCH_INDEX  package index for the torch wheel, for example one of CPU wheels
#                         (default: whatever pip is set up to use)
#
# Where that interpreter already imports a torch in setup.py's range (a CUDA container, say), the
# new environment uses it; a second one is never installed beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH="torch==2.13.0"
readonly VENV="$PWD/.venv"
readonly STAMP="$VENV/.genrecal" # line 1: made on and for; line 2, once all is in: what is in it

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON: no such program"
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is older than 3.10; name a newer one"
        candidate=$PYTHON
    else
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 ""; do
            [ -n "$candidate" ] ||
                die "no python3 >= 3.10 found; install one, or name it: make PYTHON=..."
            is_new_enough "$candidate" && break
        done
    fi
    # Inside our own active environment, what it was made on.
    "$candidate" - "$VENV" <<'PY'
import os, sys
ours = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])
print(sys._base_executable if ours else sys.executable)
PY
}

# Prints the folder of an importable torch in setup.py's range, or nothing.
find_torch() {
    "$1" - <<'PY'
import os, re
low, high = re.search(r'"torch>=([\d.]+),<([\d.]+)"', open("setup.py").read()).groups()
try:
    import torch
except (ImportError, OSError):  # OSError: its shared libraries do not load
    raise SystemExit
def number(text):
    return tuple(int(part) for part in text.split(".")[:2])
if number(low) <= number(torch.__version__) < number(high):
    print(os.path.dirname(os.path.dirname(torch.__file__)))
PY
}

contents=$(cat setup.py requirements/*.txt launch/setup_env.sh | cksum)
made_on=$({ [ -f "$STAMP" ] && head -n 1 "$STAMP"; } || true)
if [ -n "$made_on" ] && "$VENV/bin/python" -c '' 2>/dev/null &&
    [ "${made_on#*' for '}" = "$VENV" ] && [ -z "${PYTHON:-}" ]; then
    python=${made_on%%' for '*} # made with PYTHON=..., perhaps; that need not be repeated
else
    python=$(find_python)
fi
if [ "$made_on" = "$python for $VENV" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    [ "$(sed -n 2p "$STAMP")" != "$contents" ] || exit 0
else
    if [ -e "$VENV" ] && [ -z "$made_on" ]; then
        die ".venv is not from an earlier set-up of this project; move it away and try again"
    fi
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python cannot make environments; install its venv (Debian, Ubuntu: python3-venv)"
    echo "setup: making .venv on $python"
    torch_folder=$(find_torch "$python")
    rm -rf "$VENV"
    mkdir "$VENV"
    printf '%s\n' "$python for $VENV" >"$STAMP"
    "$python" -m venv ${torch_folder:+--system-site-packages} "$VENV"
    if [ -n "$torch_folder" ] && [ -z "$(find_torch "$VENV/bin/python")" ]; then
        # $python is an environment itself, so --system-site-packages passed it by.
        site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        printf '%s\n' "$torch_folder" >"$site/genrecal_parent.pth"
    fi
fi
printf '%s\n' "$python for $VENV" >"$STAMP" # unfinished until the second line is there

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ -z "$(find_torch "$VENV/bin/python")" ]; then
    echo "setup: installing $TORCH"
    # On its own and first: a later resolution then finds it in place and fetches no other build.
    pip install --quiet --quiet "$TORCH" \
        ${GENRECAL_TORCH_INDEX:+--index-url "$GENRECAL_TORCH_INDEX"}
fi
echo "setup: installing genrecal_ds and the pinned requirements"
keep_torch=$(mktemp)
trap 'rm -f "$keep_torch"' EXIT
"$VENV/bin/python" >"$keep_torch" \
    -c 'from importlib.metadata import version; print("torch==" + version("torch"))'
pip install --quiet --quiet --editable '.[dev,demo]' \
    --constraint requirements/cpu.txt --constraint "$keep_torch"
commands=() # where the interpreter's own packages are seen, their commands still lie elsewhere
for name in deepspeed ninja ruff; do
    [ -x "$VENV/bin/$name" ] || commands+=("$name")
done
if [ "${#commands[@]}" -gt 0 ]; then
    pip install --quiet --quiet --ignore-installed --no-deps "${commands[@]}" \
        --constraint requirements/cpu.txt
fi

"$VENV/bin/python" - <<'PY'
from importlib.metadata import version
import torch
found = " ".join(f"{name} {version(name)}" for name in ("deepspeed", "transformers", "webdataset"))
print(f"setup: ready. {found} torch {torch.__version__} in {torch.__path__[0]}")
PY
printf '%s\n' "$contents" >>"$STAMP"
