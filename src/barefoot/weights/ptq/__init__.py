"""Post-training steps on networks of nodes (:mod:`barefoot.weights.integers.network`), for any number format.

None of them is part of a format: each takes real weights or what a format made of them, and returns real numbers.
"""
