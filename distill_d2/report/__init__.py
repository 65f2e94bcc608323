"""Read what runs have left behind, compare them, and show them on one page."""
