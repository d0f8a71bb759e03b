"""What people have, as documents: one file for each form."""
