"""Run on every rank: train a recipe and print how many engines are alive behind each stage."""

import gc
import sys

import deepspeed

from genrecal_ds.training import run
from launch.train import main

run_stage = run.run_stage


def counted(*arguments):
    is_finished = run_stage(*arguments)
    gc.collect()
    engines = [o for o in gc.get_objects() if isinstance(o, deepspeed.DeepSpeedEngine)]
    print(f"behind {arguments[1].name}: {len(engines)} engines", flush=True)
    return is_finished


run.run_stage = counted
sys.exit(main(sys.argv[1:]))
