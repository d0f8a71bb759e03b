"""The V4 stack, one idea a file. Model code knows no ranks."""
