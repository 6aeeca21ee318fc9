#!/usr/bin/env bash
# Weaker teachers, other students, and eyes that train: an hour on 2 cores, after
# launch/studies/study.sh. Afterwards runs/study_gap/tables.md and runs/study_vision/tables.md hold
# the scores. docs/results.md ("The gap") says what came out.
#
#   launch/studies/study_gap.sh
#   JOBS=4 launch/studies/study_gap.sh     how many runs at a time (default 2)
#
# Started again it goes on: finished shards and runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
readonly RECIPES=launch/recipes/demo JOBS="${JOBS:-2}"
readonly WRONG=data.train=runs/demo/data/train_wrong

# Scenes that neither the demo's teacher nor any student has seen.
python -m data_tools.build digits --format digits --split train --num-samples 16000 --seed 7 \
    --out runs/demo/data/other

# A teacher of those other scenes, and a weaker one: 900 steps in place of 1,600.
python launch/train.py "$RECIPES/teacher.yaml" run_dir=runs/demo/other_teacher \
    data.train=runs/demo/data/other
python launch/train.py "$RECIPES/teacher.yaml" run_dir=runs/demo/weak_teacher \
    data.train=runs/demo/data/other stages.learn.steps=900

# A teacher of the very samples that the student is given, 35 % of them wrong.
python launch/train.py "$RECIPES/teacher.yaml" run_dir=runs/demo/wrong_teacher "$WRONG"

# A smaller student and a larger one. The larger one learns at a lower rate.
python launch/train.py "$RECIPES/baseline.yaml" run_dir=runs/demo/small \
    student.path=runs/demo/models/small_init
python launch/train.py "$RECIPES/baseline.yaml" run_dir=runs/demo/large \
    student.path=runs/demo/models/large_init optimizer.lr=2e-3 stages.see.final_lr=2e-4

# Runs beside each other may read one cache of the teacher's rows but not write it, so the samples
# go through each of the three teachers first.
for name in other weak wrong; do
    python launch/train.py "$RECIPES/ablation.yaml" --cache-only stages.distill.steps=null \
        stages.distill.epochs=1 run_dir=runs/ablation/fill "$WRONG" \
        teacher.path="runs/demo/${name}_teacher/learn/student" \
        teacher.cache="runs/ablation/rows_$name"
done

# Every arm for every pair; then the arms whose student trains its vision encoder as well.
for grid in study_gap study_vision; do
    python -m genrecal_ds.ablate "$RECIPES/ablation.yaml" --jobs "$JOBS" \
        --grid "launch/grids/$grid.yaml" --out "runs/$grid"
done
