"""Public annotation formats to sharded Parquet in our rows: ``python -m simla_ray.data.adapt --help``.

annotations ─ a format's function ─ Gathered (records by image, what was dropped) ─ pictures ─ rows ─ shards, manifest
"""
