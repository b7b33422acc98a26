"""What two detectors find on the same images."""
