"""An exported student answers questions: generation, scores with intervals, one JSON.

python -m genrecal_ds.evaluate EXPORT SHARDS --out result.json
"""
