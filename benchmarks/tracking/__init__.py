"""State tracking: learned on short rows, tested on longer ones."""
