"""What travels between processes: a codec without pickle, and the sockets that carry it."""
