"""Run verbs in a container: Docker's engine, the image, the container, and the files that go in and out.

A verb goes in whole. Its input files are sent to a volume, kolotune runs there with ``--json``, the client's own
reporter shows its messages here, and its results come back. The client needs no torch.
"""
