"""Evaluation of a trained model: one file per task, one result type, one table. ``tasks.evaluate`` runs them."""
