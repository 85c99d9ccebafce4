"""What a step costs each rank, from shapes and a layout alone: memory, traffic and work."""
