"""The objectives: pure torch functions over the forward's record. No I/O, no Ray, no transformers."""
