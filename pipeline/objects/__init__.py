"""Objects below a URL, and what is built on them."""
