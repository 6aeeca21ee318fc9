#!/usr/bin/env bash
# The paper's ablations and the baselines at toy size: about an hour on 2 cores, after `make demo`.
# Afterwards runs/ablation/tables.md and runs/ablation_twin/tables.md hold the scores, and the demo's
# report shows them too. docs/results.md says what came out.
#
#   launch/studies/ablation.sh
#   JOBS=4 launch/studies/ablation.sh     how many runs at a time (default 2)
#
# Started again it goes on: finished runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
readonly RECIPE=launch/recipes/demo/ablation.yaml JOBS="${JOBS:-2}"

# Runs beside each other may read one cache of the teacher's rows but not write it, so each set of
# samples goes through the teacher first. One epoch covers every sample that a run can draw.
for data in train share; do
    python launch/train.py "$RECIPE" --cache-only stages.distill.steps=null \
        stages.distill.epochs=1 run_dir=runs/ablation/fill data.train="runs/demo/data/$data"
done

# Every arm with every seed.
python -m genrecal_ds.ablate "$RECIPE" --jobs "$JOBS" \
    --grid launch/grids/demo.yaml --out runs/ablation

# A student that has the teacher's own tokenizer: with it GenRecal can stand beside methods that
# compare logits token by token.
python launch/train.py launch/recipes/demo/twin.yaml
python -m genrecal_ds.ablate "$RECIPE" --jobs "$JOBS" \
    --grid launch/grids/demo_twin.yaml --out runs/ablation_twin
