"""Live local dashboard of loss curves and monitors."""
