"""The thin rim between the core and the world: who drives, what waits, where handlers run."""
