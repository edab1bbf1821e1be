"""A run: fits one behind the other in a folder that knows how far they came, and what is measured of them."""
