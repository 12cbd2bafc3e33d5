"""What a run says of itself: the manifest, the page, summaries."""
