"""Who runs where, what is refused before anything starts, and how every process ends."""
