"""The protocol, sans-IO: no sockets, threads, clock, chance, files or logging. Events go in, commands come out."""
