"""Scores an exported student: it answers questions; one JSON holds scores with intervals.

python -m genrecal_ds.evaluate EXPORT SHARDS --out result.json
"""
