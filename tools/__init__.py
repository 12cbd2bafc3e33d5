"""What people run: the command line, benches, reports."""
