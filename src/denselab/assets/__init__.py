"""Files that come with the package: the built-in model."""
