"""What reports of several runs share: sweeps and comparisons."""
