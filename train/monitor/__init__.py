"""Monitors: quantities watched beside the loss, one file each."""
