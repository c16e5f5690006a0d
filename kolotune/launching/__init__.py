"""Launch a run as a job on a cluster or on other machines: plan, submit and follow it, and fetch its results.

`launcher.py` says what a launcher does; each scheduler is one module, listed in `registry.py`. `node.py` runs on each
machine of a job, and does a `NodeTask`.
"""
