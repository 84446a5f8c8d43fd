"""Models of hardware that is not there: what they say is simulated, and every record says so."""
