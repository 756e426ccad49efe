"""Ray Train, Ray Tune and everything that starts them. Importing it sets Ray's defaults before Ray is imported."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train page
# Workers share the cores of a small machine on purpose; Ray warns of it in the middle of our lines.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
