"""What a checkpoint holds, and whether it is still what was saved. No pickle is read or written here."""
