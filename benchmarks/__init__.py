"""Side-by-side measurements: the authors' recipe, built from transformers' classes, and ours (docs/performance.md)."""
