"""Any source to sharded Parquet, and what is wrong with a data set: ``python -m simla_ray.data.convert --help``.

URIs ─ survey (uids, columns, sizes) ─ plan (stretches of ordinals) ─ shards, a Ray task each ─ manifest.json
     └ check: every row decoded ─ findings and statistics ─ check.html
"""
