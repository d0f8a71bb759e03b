"""What one rank does: model, optimizer, loop, checkpoints, monitors."""
