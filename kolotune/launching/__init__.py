"""A run's job on a cluster or on other machines: planned, submitted, followed, and its results fetched.

`contract.py` says what a launcher does; each scheduler is one module. `node.py` is what every machine of a job does.
"""
