"""What a run leaves: its folder, what it was made of, its results as data, and the report that a person reads."""
