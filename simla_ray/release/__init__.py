"""Weights out of a run and into other hands: an exported folder, its model card, and what one call makes of it."""
