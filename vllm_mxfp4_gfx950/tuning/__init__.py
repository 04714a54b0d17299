"""Finding the fastest right tiles by timing them on this machine's GPU."""
