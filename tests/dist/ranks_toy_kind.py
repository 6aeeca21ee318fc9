"""Run on every rank: launch/train.py after one entry more in the table of kinds.

ranks_toy_kind.py RECIPE
"""

import sys

from genrecal_ds.recipe.kinds import KINDS, Kind

KINDS["row_lengths"] = Kind("tests.dist.toy_objective")

if __name__ == "__main__":
    from launch.train import main

    sys.exit(main())
