"""`mneme doctor`: is this machine fit to train, and what to do if it is not."""
