"""Results of experiments as pictures, checks and one HTML page."""
