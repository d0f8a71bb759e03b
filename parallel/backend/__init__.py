"""One interface over accelerators, one file per vendor. The only place that names a vendor."""
