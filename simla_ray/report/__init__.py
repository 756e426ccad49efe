"""The self-contained report of a run, and its lines on the terminal."""
