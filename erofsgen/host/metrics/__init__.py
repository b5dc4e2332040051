"""What the daemon tells Prometheus. :mod:`.families` has the table of all names."""
