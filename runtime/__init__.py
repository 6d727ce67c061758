"""Things that run: students, statistics, training, sessions, export."""
