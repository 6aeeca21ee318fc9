# Sourced by the job scripts: where the project is, which python, and --dry-run.
#
#   GENRECAL_ROOT      the project's folder; default: where sbatch was called
#   GENRECAL_PYTHON    default: python3 of the environment that sbatch was called in
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

here=$PWD # where the user called
cd "${GENRECAL_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
[ -f launch/slurm/common.sh ] || fail "call sbatch in the project's folder, or set GENRECAL_ROOT"
python=${GENRECAL_PYTHON:-python3}

dry_run=false
arguments=()
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=true; else arguments+=("$argument"); fi
done

# Print a command so that a shell would read it as it is run.
show() {
    printf '%q ' "$@"
    echo
}

run_or_show() {
    if $dry_run; then show "$@"; else "$@"; fi
}
