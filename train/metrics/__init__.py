"""What a run says of itself: lines of metrics, curves, speed, stability."""
