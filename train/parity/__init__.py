"""What the ranks of `mneme parity` do: train a few steps and compare every tensor with one rank's."""
