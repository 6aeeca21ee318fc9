#!/usr/bin/env bash
# One released model taught by another, on two CPU cores, after `make setup`: Qwen2.5-Coder-0.5B
# teaches SmolLM2-135M to write function bodies of Python's standard library. SFT, byte KL and
# GenRecal train the student for the same steps on the same samples. Afterwards
# runs/real/stepsN/report.md holds held-out bits per byte, the teacher's KL and three bodies beside
# each other.
#
#   launch/studies/real.sh                    `make real`
#   STEPS=20 SEEDS=3 launch/studies/real.sh   `make real STEPS=20 SEEDS=3`
#
# STEPS: steps of the student in each arm, of 8 samples (default 120). Each of an arm's two stages
# reads every sample once, as does GenRecal's align. SEEDS: how many (default 1). Started again it
# goes on: finished stages are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
readonly STEPS="${STEPS:-120}" SEEDS="${SEEDS:-1}" MODELS=runs/real/models HELDOUT=64
readonly RUN="runs/real/steps$STEPS" HALF=$((STEPS / 2))
readonly GIVEN=(
    data.train="$RUN/data/train" stages.first.steps="$HALF" stages.second.steps="$HALF"
)

python -m launch.real.releases smollm2_135m qwen2_5_coder_0_5b
python -m launch.real.functions "$RUN/functions" --train $((8 * HALF)) \
    --heldout "$HELDOUT"
for split in train heldout; do
    python -m data_tools.build "$RUN/functions/$split.jsonl" --format llava --out "$RUN/data/$split"
done

# The teacher reads every sample once; distill and the byte KL read its rows from disk.
python launch/train.py launch/recipes/real/byte_kd.yaml --cache-only run_dir="$RUN/fill" \
    data.train="$RUN/data/train" teacher.cache="$RUN/teacher_rows" \
    stages.first.steps=null stages.first.epochs=1

seeds=$(seq 1 "$SEEDS")
for seed in $seeds; do
    for arm in sft byte_kd genrecal; do
        own=()
        [ "$arm" = sft ] || own=(teacher.cache="$RUN/teacher_rows")
        [ "$arm" != genrecal ] || own+=(stages.align.steps="$HALF")
        python launch/train.py "launch/recipes/real/$arm.yaml" seed="$seed" \
            run_dir="$RUN/seed$seed/$arm" "${GIVEN[@]}" "${own[@]}"
    done
    python -m genrecal_ds.analysis.bits "$MODELS/qwen2_5_coder_0_5b" "$RUN/data/heldout" \
        "$MODELS/smollm2_135m" "$RUN/seed$seed"/{sft,byte_kd,genrecal}/second/student \
        --out "$RUN/seed$seed/bits.json" --samples "$HELDOUT"
done
# shellcheck disable=SC2086  # one word a seed
python -m launch.real.report "$RUN" --seeds $seeds
