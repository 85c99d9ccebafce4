"""What a step costs each rank, computed from shapes and the parallelism: memory, traffic and work."""
