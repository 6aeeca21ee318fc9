#!/usr/bin/env bash
# Puts torchvision and torchao into the folder $1, beside .venv and not in it; `make test-extras`
# uses them. Without --no-deps pip would fetch another torch for torchvision. Exit code 3: there is
# no release for this torch here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly FOLDER="$1"
readonly PACKAGES=(torchvision==0.28.0 torchao==0.18.0) # torchvision's release for torch 2.13

torch=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')
case "$torch" in
2.13.*) ;;
*)
    echo "setup: extras are known for torch 2.13 alone, not $torch: their tests are left out" >&2
    exit 3
    ;;
esac
[ "$(cat "$FOLDER/.packages" 2>/dev/null || true)" != "${PACKAGES[*]}" ] || exit 0
rm -rf "$FOLDER"
echo "setup: installing ${PACKAGES[*]} in $FOLDER"
.venv/bin/python -m pip --disable-pip-version-check install --quiet --quiet --no-deps \
    --target "$FOLDER" "${PACKAGES[@]}"
printf '%s\n' "${PACKAGES[*]}" >"$FOLDER/.packages"
