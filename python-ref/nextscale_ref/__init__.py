"""References of nextscale's ops, written from the papers, slow and clear."""
