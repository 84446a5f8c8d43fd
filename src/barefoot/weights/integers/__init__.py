"""Networks that run in whole numbers alone: products, sums, shifts and comparisons of integers from input to output.

What a network computes is then the same on every machine, bit for bit. Scales are real numbers only while a network is
converted; they end up as dyadic numbers c / 2^n (:mod:`barefoot.weights.integers.dyadic`).
"""
