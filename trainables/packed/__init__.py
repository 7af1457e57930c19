"""Many trials on one frozen base: their rows go through each quantised layer together."""
