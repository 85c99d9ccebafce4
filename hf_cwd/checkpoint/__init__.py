"""The files of a checkpoint, and whether they are still what was saved. No pickle is read or written here."""
