"""What verifies, times and counts: the same for all cases."""
