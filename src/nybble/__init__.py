"""nybble."""
