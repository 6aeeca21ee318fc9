#!/usr/bin/env bash
# Which arm beats SFT where labels are wrong or few: three hours on 2 cores, after `make demo`.
# Afterwards runs/study/tables.md and runs/study_ideas/tables.md hold the scores. docs/results.md
# ("Beyond the paper") says what came out.
#
#   launch/studies/study.sh
#   JOBS=4 launch/studies/study.sh     how many runs at a time (default 2)
#
# Started again it goes on: finished shards and runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
readonly RECIPE=launch/recipes/demo/ablation.yaml JOBS="${JOBS:-2}"
readonly DATA=runs/demo/data IDEAS=runs/study_ideas

# The demo's samples with 35 % wrong answers. The seed is that of the demo's own set, so the scenes
# are the same and only the labels differ.
digits() { python -m data_tools.build digits --format digits --split train "$@"; }
digits --num-samples 16000 --seed 2 --wrong-share 0.35 --out "$DATA/train_wrong"

# Few samples, with right labels and with wrong ones.
digits --num-samples 1000 --seed 6 --out "$DATA/small"
digits --num-samples 1000 --seed 6 --wrong-share 0.35 --out "$DATA/small_wrong"

# Runs beside each other may read one cache of the teacher's rows but not write it, so each set of
# samples goes through the teacher first.
for data in train train_wrong small small_wrong; do
    python launch/train.py "$RECIPE" --cache-only stages.distill.steps=null \
        stages.distill.epochs=1 run_dir=runs/ablation/fill data.train="$DATA/$data"
done

# Every arm on every set with every seed.
python -m genrecal_ds.ablate "$RECIPE" --jobs "$JOBS" --grid launch/grids/study.yaml --out runs/study

# The variants also ask what the teacher's own answers teach: it answers half of the wrongly
# labelled questions, and its answers become shards, right or wrong (--min-score 0).
python -m genrecal_ds.evaluate runs/demo/teacher/learn/student "$DATA/train_wrong" --limit 8000 \
    --max-new-tokens 32 --out "$IDEAS/teacher.json"
python -m data_tools.collect_responses "$DATA/train_wrong" "$IDEAS/teacher.predictions.jsonl" \
    --min-score 0 --out "$DATA/teacher_answers"

# Every variant of the Recalibrator's passes, on the wrong labels.
python -m genrecal_ds.ablate "$RECIPE" --jobs "$JOBS" \
    --grid launch/grids/study_ideas.yaml --out "$IDEAS"
