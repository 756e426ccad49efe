"""simla_ray: vision-language pretraining with SIMLA on Ray."""

__version__ = "0.1.0"
