"""The run folder: everything of a run in one place, what it was made of, and the report a person reads."""
