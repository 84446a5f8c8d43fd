"""The words every other layer speaks: bytes, terms, footprints, budgets, techniques, model shapes, devices."""
