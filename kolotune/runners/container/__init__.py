"""The container, as a runner: Docker's engine, the image, the container, and a verb that runs inside.

A verb goes in whole: its files are sent to a volume, kolotune runs there with ``--json``, its messages are shown
here by the client's own reporter, and what it made comes out again. The client needs no torch.
"""
