"""A model becomes one file, and the file is checked against the model before it is kept."""
