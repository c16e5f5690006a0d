"""What a run needs before it starts: workload, memory, disk, time, network, and whether it fits."""
