"""From a model, a job and a budget to a plan: what is chosen, its bytes, its time, its quality, or why nothing fits."""
