"""Tensor-parallel all-reduces with 16, 8 or 4 bits on the wire: recipes, who uses which, codecs, and the reductions."""
