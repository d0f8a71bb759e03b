"""What every backend must be able to do: one suite, for the tests and for `mneme doctor`."""
