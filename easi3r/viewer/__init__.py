"""To look at a scene: live in a browser, as one self-contained page, and as a video.  Nothing here needs torch."""
